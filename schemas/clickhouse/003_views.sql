-- What people query. Every view reads its tables with FINAL: a row that was inserted twice is there once.

CREATE OR REPLACE VIEW gaps
(
    topic       String                 COMMENT 'The topic whose records are missing.',
    epoch       String                 COMMENT 'Which life of the topic.',
    `partition` Int32                  COMMENT 'Its partition.',
    lo          Int64                  COMMENT 'First offset that could not be read.',
    hi          Int64                  COMMENT 'Last offset that could not be read.',
    stage       LowCardinality(String) COMMENT 'The stage that missed them.',
    message     String                 COMMENT 'What happened, in words.',
    found_at    DateTime64(3, 'UTC')   COMMENT 'When it was found.'
)
AS SELECT
    splitByChar(':', origin)[1] AS topic,
    splitByChar(':', origin)[2] AS epoch,
    toInt32OrZero(splitByChar(':', origin)[3]) AS `partition`,
    JSONExtractInt(detail, 'from') AS lo,
    -- A truncated log goes on below where the reader stood: then no offset is known to be lost, only that some were.
    greatest(JSONExtractInt(detail, 'resume_at') - 1, lo) AS hi,
    stage,
    message,
    failed_at AS found_at
FROM dead_letters FINAL
WHERE kind = 'gap'
COMMENT 'Ranges of offsets that a stage could not read any more: retention overtook it, or the log lost its end.';

CREATE OR REPLACE VIEW events
(
    event_id           String                 COMMENT 'The event; `rewatch explain` takes it.',
    camera_id          LowCardinality(String) COMMENT 'The camera.',
    camera_name        String                 COMMENT 'The camera''s name for people, as it was then.',
    started_at         DateTime64(3, 'UTC')   COMMENT 'When the first frame of the window was taken.',
    ended_at           DateTime64(3, 'UTC')   COMMENT 'When the last frame that matters was taken.',
    started_local      String                 COMMENT 'started_at by the clock where the camera is, YYYY-MM-DD hh:mm:ss.',
    ended_local        String                 COMMENT 'ended_at by the clock where the camera is.',
    time_zone          String                 COMMENT 'IANA time zone of the camera.',
    risk_score         Int32                  COMMENT 'Risk, 0 to 100.',
    risk_level         LowCardinality(String) COMMENT 'low 0-29, medium 30-59, high 60-84, critical 85-100.',
    summary            String                 COMMENT 'What happened, in a sentence.',
    reasoning          String                 COMMENT 'Why the score is what it is.',
    risk_factors       Array(String)          COMMENT 'What raised or lowered the risk.',
    entities           Array(String)          COMMENT 'Who and what was there.',
    recommended_action LowCardinality(String) COMMENT 'none, review, notify or call.',
    frames             UInt64                 COMMENT 'Frames in the window.',
    batch_id           String                 COMMENT 'The window that was judged.',
    model              LowCardinality(String) COMMENT 'The model that judged it.',
    prompt_digest      LowCardinality(String) COMMENT 'The prompt version that it was judged with.',
    verdict_digest     LowCardinality(String) COMMENT 'Digest of prompt, schema, parameters and weights: equal means judged by the same.',
    judged_at          DateTime64(3, 'UTC')   COMMENT 'When it was judged.'
)
AS SELECT
    e.event_id AS event_id,
    e.camera_id AS camera_id,
    c.camera_name AS camera_name,
    e.started_at AS started_at,
    e.ended_at AS ended_at,
    formatDateTime(e.started_at, '%F %T', time_zone) AS started_local,
    formatDateTime(e.ended_at, '%F %T', time_zone) AS ended_local,
    -- An unknown zone would fail the whole query.
    if(c.zone IN (SELECT time_zone FROM system.time_zones), c.zone, 'UTC') AS time_zone,
    e.risk_score AS risk_score,
    e.risk_level AS risk_level,
    e.summary AS summary,
    e.reasoning AS reasoning,
    e.risk_factors AS risk_factors,
    e.entities AS entities,
    e.recommended_action AS recommended_action,
    length(e.frame_ids) AS frames,
    e.batch_id AS batch_id,
    e.model AS model,
    e.prompt_digest AS prompt_digest,
    e.verdict_digest AS verdict_digest,
    e.judged_at AS judged_at
FROM (SELECT * FROM risk_events FINAL WHERE run = 'live') AS e
LEFT ANY JOIN (SELECT camera_id, batch_id, camera_name, time_zone AS zone FROM contexts FINAL) AS c
    ON c.camera_id = e.camera_id AND c.batch_id = e.batch_id
SETTINGS allow_nonconst_timezone_arguments = 1
COMMENT 'What was seen and how it was judged: one row per live event.';

CREATE OR REPLACE VIEW event_lineage
(
    event_id            String                 COMMENT 'The event.',
    camera_id           LowCardinality(String) COMMENT 'The camera.',
    batch_id            String                 COMMENT 'The window that was judged.',
    closed_by           LowCardinality(String) COMMENT 'Why the window closed: idle, length, frames, fast_path, tick or end_of_stream.',
    settings_digest     LowCardinality(String) COMMENT 'Window settings that it was made with.',
    n                   UInt64                 COMMENT 'The frame''s place in the window, from 1.',
    frame_id            String                 COMMENT 'The frame.',
    event_at            DateTime64(3, 'UTC')   COMMENT 'The frame''s event time.',
    matters             Bool                   COMMENT 'Whether the frame held a detection that matters.',
    labels              Array(String)          COMMENT 'What was seen in it with at least the camera''s threshold.',
    sha256              String                 COMMENT 'SHA-256 of the image bytes, hex; empty where the frame is not kept any more.',
    claim               Nullable(String)       COMMENT 'URI of the image; null where it is inside the record in `log`.',
    source_name         String                 COMMENT 'The file''s name as it came.',
    captured_at         Nullable(DateTime64(3, 'UTC')) COMMENT 'Capture time, where it is known.',
    arrived_at          DateTime64(3, 'UTC')   COMMENT 'When ingest took it.',
    `partition`         Int32                  COMMENT 'Partition of this camera''s records on every topic.',
    frame_epoch         String                 COMMENT 'Which life of `frames` the record is from.',
    frame_offset        Int64                  COMMENT 'Offset of the record on `frames`.',
    detection_epoch     String                 COMMENT 'Which life of `detections` the record is from.',
    detection_offset    Int64                  COMMENT 'Offset of the record on `detections`.',
    batch_epoch         String                 COMMENT 'Which life of `batches` the record is from.',
    batch_offset        Int64                  COMMENT 'Offset of the record on `batches`.',
    event_epoch         String                 COMMENT 'Which life of `risk_events` the record is from.',
    event_offset        Int64                  COMMENT 'Offset of the record on `risk_events`.',
    detector            String                 COMMENT 'Model that looked at the frame.',
    detector_digest     String                 COMMENT 'SHA-256 of its weights, hex.',
    model               LowCardinality(String) COMMENT 'Model that judged the window.',
    model_digest        LowCardinality(String) COMMENT 'SHA-256 of its weights, hex.',
    prompt_digest       LowCardinality(String) COMMENT 'Prompt version that it was judged with.',
    prompt_name         String                 COMMENT 'Its name for people; empty where none was given.',
    verdict_digest      LowCardinality(String) COMMENT 'Digest of prompt, schema, parameters and weights.',
    parameters          String                 COMMENT 'Sampling parameters, JSON.',
    conditions          Map(LowCardinality(String), String) COMMENT 'Conditions of its making.'
)
AS SELECT
    e.event_id AS event_id,
    e.camera_id AS camera_id,
    e.batch_id AS batch_id,
    b.closed_by AS closed_by,
    b.settings_digest AS settings_digest,
    b.n AS n,
    b.frame_id AS frame_id,
    b.event_at AS event_at,
    b.matters AS matters,
    b.labels AS labels,
    f.sha256 AS sha256,
    f.claim AS claim,
    f.source_name AS source_name,
    f.captured_at AS captured_at,
    f.arrived_at AS arrived_at,
    b.`partition` AS `partition`,
    f.epoch AS frame_epoch,
    f.`offset` AS frame_offset,
    b.detections_epoch AS detection_epoch,
    b.detection_offset AS detection_offset,
    b.epoch AS batch_epoch,
    b.`offset` AS batch_offset,
    e.epoch AS event_epoch,
    e.`offset` AS event_offset,
    d.model AS detector,
    d.model_digest AS detector_digest,
    e.model AS model,
    e.model_digest AS model_digest,
    e.prompt_digest AS prompt_digest,
    p.name AS prompt_name,
    e.verdict_digest AS verdict_digest,
    e.parameters AS parameters,
    e.conditions AS conditions
FROM (SELECT * FROM risk_events FINAL WHERE run = 'live') AS e
INNER JOIN
(
    SELECT
        camera_id, batch_id, closed_by, settings_digest, detections_epoch, epoch, `partition`, `offset`,
        n, frame_id, event_at, matters, detection_offset, tupleElement(boxes, 'label') AS labels
    FROM batches FINAL
    ARRAY JOIN
        arrayEnumerate(frames.frame_id) AS n,
        frames.frame_id AS frame_id,
        frames.event_at AS event_at,
        frames.matters AS matters,
        frames.offset AS detection_offset,
        frames.boxes AS boxes
) AS b ON b.camera_id = e.camera_id AND b.batch_id = e.batch_id
LEFT ANY JOIN (SELECT * FROM frames FINAL) AS f ON f.camera_id = b.camera_id AND f.frame_id = b.frame_id
LEFT ANY JOIN (SELECT camera_id, frame_id, model, model_digest FROM detections FINAL) AS d
    ON d.camera_id = b.camera_id AND d.frame_id = b.frame_id
LEFT ANY JOIN (SELECT digest, name FROM prompts FINAL WHERE kind = 'version') AS p ON p.digest = e.prompt_digest
COMMENT 'What each live event was made from: one row per event and frame, with hashes, offsets, models and prompt.';

CREATE OR REPLACE VIEW camera_activity
(
    camera_id  LowCardinality(String) COMMENT 'The camera.',
    hour       DateTime('UTC')        COMMENT 'Start of the hour, by when the frames were taken.',
    frames     UInt64                 COMMENT 'Frames taken in the hour.',
    detections Map(String, UInt64)    COMMENT 'Boxes of each class with at least the camera''s threshold (0.5 where none is set).',
    windows    UInt64                 COMMENT 'Windows that began in the hour.',
    events     UInt64                 COMMENT 'Live events that began in the hour.',
    top_risk   Nullable(Int32)        COMMENT 'Highest risk score of them; null where there is none.',
    last_seen  Nullable(DateTime64(3, 'UTC')) COMMENT 'When the last frame of the hour was taken.'
)
AS SELECT
    camera_id,
    hour,
    sum(frame_count) AS frames,
    sumMap(seen) AS detections,
    sum(window_count) AS windows,
    sum(event_count) AS events,
    max(risk) AS top_risk,
    max(taken_at) AS last_seen
FROM
(
    SELECT
        camera_id,
        -- A camera whose clock runs ahead did not take its pictures in the future.
        least(ifNull(captured_at, arrived_at), arrived_at) AS taken_at,
        toStartOfHour(taken_at) AS hour,
        1 AS frame_count,
        CAST(map(), 'Map(String, UInt64)') AS seen,
        0 AS window_count,
        0 AS event_count,
        CAST(NULL, 'Nullable(Int32)') AS risk
    FROM frames FINAL
    UNION ALL
    SELECT
        d.camera_id,
        CAST(NULL, 'Nullable(DateTime64(3, \'UTC\'))') AS taken_at,
        toStartOfHour(least(ifNull(d.captured_at, d.arrived_at), d.arrived_at)) AS hour,
        0,
        CAST(map(d.label, count()), 'Map(String, UInt64)'),
        0,
        0,
        NULL
    FROM
    (
        SELECT camera_id, captured_at, arrived_at, label, score
        FROM detections FINAL
        ARRAY JOIN boxes.label AS label, boxes.score AS score
    ) AS d
    LEFT ANY JOIN
    (
        SELECT camera_id, argMax(window_threshold, updated_at) AS threshold FROM cameras FINAL GROUP BY camera_id
    ) AS c ON c.camera_id = d.camera_id
    -- Without a match the join gives 0, and no threshold of a camera is 0.
    WHERE d.score >= if(c.threshold > 0, c.threshold, 0.5)
    GROUP BY d.camera_id, hour, d.label
    UNION ALL
    SELECT camera_id, NULL, toStartOfHour(started_at), 0, CAST(map(), 'Map(String, UInt64)'), 1, 0, NULL
    FROM batches FINAL
    UNION ALL
    SELECT camera_id, NULL, toStartOfHour(started_at), 0, CAST(map(), 'Map(String, UInt64)'), 0, 1, risk_score
    FROM risk_events FINAL
    WHERE run = 'live'
)
GROUP BY camera_id, hour
COMMENT 'What each camera did in each hour.';

CREATE OR REPLACE VIEW pipeline_lag
(
    topic            String                         COMMENT 'The topic.',
    records          UInt64                         COMMENT 'Records kept, ticks left out.',
    ticks            UInt64                         COMMENT 'Ticks kept.',
    undecodable      UInt64                         COMMENT 'Records without a typed row; log.decode_error says why.',
    partitions       UInt64                         COMMENT 'Partitions that have records.',
    last_at          Nullable(DateTime64(3, 'UTC')) COMMENT 'Time of the newest record, by its own account: arrival for frames, verdict for events.',
    last_inserted_at Nullable(DateTime64(3, 'UTC')) COMMENT 'When the sink last completed a range.',
    arrival_p50_s    Nullable(Float64)              COMMENT 'From a frame''s arrival to this record, median of the newest hour, seconds.',
    arrival_p95_s    Nullable(Float64)              COMMENT 'The same, 95th percentile.'
)
AS SELECT
    t.topic AS topic,
    p.records AS records,
    p.tick_records AS ticks,
    p.undecodable_records AS undecodable,
    p.partitions AS partitions,
    t.last_at AS last_at,
    nullIf(p.inserted_at, toDateTime64(0, 3, 'UTC')) AS last_inserted_at,
    if(empty(a.quantiles), NULL, a.quantiles[1]) AS arrival_p50_s,
    if(empty(a.quantiles), NULL, a.quantiles[2]) AS arrival_p95_s
FROM
(
    SELECT 'frames' AS topic, maxOrNull(arrived_at) AS last_at FROM frames
    UNION ALL SELECT 'detections', maxOrNull(detected_at) FROM detections
    UNION ALL SELECT 'batches', maxOrNull(ended_at) FROM batches
    UNION ALL SELECT 'contexts', maxOrNull(ended_at) FROM contexts
    UNION ALL SELECT 'risk_events', maxOrNull(judged_at) FROM risk_events
    UNION ALL SELECT 'labels', maxOrNull(labelled_at) FROM labels
    UNION ALL SELECT 'alerts', maxOrNull(decided_at) FROM alerts
    UNION ALL SELECT 'prompts', maxOrNull(created_at) FROM prompts
    UNION ALL SELECT 'cameras', maxOrNull(updated_at) FROM cameras
    UNION ALL SELECT 'replays', maxOrNull(updated_at) FROM replays
    UNION ALL SELECT 'replay_units', maxOrNull(created_at) FROM replay_units
    UNION ALL SELECT 'replay_events', maxOrNull(judged_at) FROM replay_events
    UNION ALL SELECT 'gpu_metrics', maxOrNull(read_at) FROM gpu_metrics
    UNION ALL SELECT 'dead_letters', maxOrNull(failed_at) FROM dead_letters
    UNION ALL SELECT 'dead_letter_status', maxOrNull(at) FROM dead_letter_status
) AS t
LEFT ANY JOIN
(
    SELECT
        topic,
        sum(rows - ticks) AS records,
        sum(ticks) AS tick_records,
        sum(undecodable) AS undecodable_records,
        uniqExact(`partition`) AS partitions,
        max(sink_progress.inserted_at) AS inserted_at
    FROM sink_progress FINAL
    GROUP BY topic
) AS p ON p.topic = t.topic
LEFT ANY JOIN
(
    SELECT 'detections' AS topic, quantilesExact(0.5, 0.95)(toFloat64(detected_at) - toFloat64(arrived_at)) AS quantiles
    FROM detections FINAL
    WHERE detected_at > (SELECT max(detected_at) FROM detections) - INTERVAL 1 HOUR
    HAVING count() > 0
    UNION ALL
    -- An event is as old as the last frame that it was made from.
    SELECT 'risk_events', quantilesExact(0.5, 0.95)(toFloat64(e.judged_at) - toFloat64(d.arrived_at))
    FROM
    (
        SELECT camera_id, frame_ids[-1] AS frame_id, judged_at
        FROM risk_events FINAL
        WHERE run = 'live' AND judged_at > (SELECT max(judged_at) FROM risk_events) - INTERVAL 1 HOUR
    ) AS e
    INNER JOIN (SELECT camera_id, frame_id, arrived_at FROM detections FINAL) AS d
        ON d.camera_id = e.camera_id AND d.frame_id = e.frame_id
    HAVING count() > 0
) AS a ON a.topic = t.topic
COMMENT 'How far each topic has come, and how long records take from a frame''s arrival.';
