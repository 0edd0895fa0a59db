-- Holds on events, and what retention has taken away: every record that `rewatch gc` deletes is written down first.
--
-- A row of `forgotten` is half a byte on disk (measured: 96,000 rows in 47 KB), so the accounting of what is gone costs
-- nothing beside what was there. Its sorting key is a record's position: a pass that marks what another marked before
-- replaces the mark. Marks are made before anything is deleted, and stay: the audit tells by them what retention took
-- from what was lost.

CREATE TABLE IF NOT EXISTS holds
(
    event_id    String COMMENT 'The event.',
    batch_id    String COMMENT 'The window that it is a verdict on: whatever was made of it or for it is held too.',
    camera_id   LowCardinality(String) COMMENT 'The camera.',
    state       LowCardinality(String) COMMENT 'held or released; the newest row of an event counts.',
    why         String COMMENT 'Why, in the words of whoever says so.',
    author      LowCardinality(String) COMMENT 'Who says so; empty where unknown.',
    at          DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch       LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition` Int32 COMMENT 'Its partition.',
    `offset`    Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (event_id, epoch, `partition`, `offset`)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'The history of holds: events that stay whatever retention says.';

CREATE TABLE IF NOT EXISTS forgotten
(
    topic       LowCardinality(String) COMMENT 'The topic.',
    epoch       LowCardinality(String) COMMENT 'Which life of the topic.',
    `partition` Int32 COMMENT 'The partition.',
    `offset`    Int64 CODEC(Delta, ZSTD(1)) COMMENT 'The offset.',
    pass        LowCardinality(String) COMMENT 'The pass of `rewatch gc` that took it; see gc_passes.',
    why         LowCardinality(String) COMMENT 'The setting whose time was over: low, medium, high, critical, unjudged, quiet, replays, gpu_metrics or dead_letters.',
    marked_at   DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(Delta, ZSTD(1)) COMMENT 'When it was marked; it was deleted after that.'
)
ENGINE = ReplacingMergeTree ORDER BY (topic, epoch, `partition`, `offset`)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'Records that retention has taken from `log` and the typed tables, or is about to.';

CREATE TABLE IF NOT EXISTS forgotten_images
(
    sha256    String COMMENT 'SHA-256 of the image, hex: its name in the image store.',
    pass      LowCardinality(String) COMMENT 'The pass that took the frames which claimed it.',
    marked_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When.'
)
ENGINE = ReplacingMergeTree ORDER BY (pass, sha256)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'Images whose frames retention took; one that another record claims stays where it is.';

CREATE TABLE IF NOT EXISTS gc_passes
(
    pass       String COMMENT 'Its name.',
    owner      LowCardinality(String) COMMENT 'Which collector it is a pass of: host and data directory.',
    started_at DateTime64(3, 'UTC') COMMENT 'When it began.',
    state      LowCardinality(String) COMMENT 'marking and marked: nothing is deleted yet; deleting; done.',
    records    UInt64 COMMENT 'Records that it took.',
    images     UInt64 COMMENT 'Images that went to the image store''s .trash.',
    at         DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When it came to this state.',
    rank       UInt8 DEFAULT indexOf(['marking', 'marked', 'deleting', 'done'], toString(state)) COMMENT 'How far that is: of two rows the one further on counts, whatever clocks say.'
)
ENGINE = ReplacingMergeTree(rank) ORDER BY pass
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'The passes of `rewatch gc`; one that is not done is finished by the next.';

CREATE OR REPLACE VIEW held
(
    event_id  String COMMENT 'The event.',
    batch_id  String COMMENT 'The window that it is a verdict on.',
    camera_id LowCardinality(String) COMMENT 'The camera.',
    why       String COMMENT 'Why it stays.',
    author    String COMMENT 'Who says so.',
    since     DateTime64(3, 'UTC') COMMENT 'When it was said last.'
)
AS SELECT event_id, newest.1 AS batch_id, newest.2 AS camera_id, newest.4 AS why, newest.5 AS author, newest.6 AS since
FROM
(
    SELECT
        event_id,
        argMax((batch_id, camera_id, toString(state), why, toString(author), holds.at), (holds.at, `offset`)) AS newest
    FROM holds FINAL
    GROUP BY event_id
)
WHERE newest.3 = 'held'
COMMENT 'Events that stay whatever retention says.';

-- With `holds`.
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
    nullIf(t.last_at, toDateTime64(0, 3, 'UTC')) AS last_at,
    nullIf(p.inserted_at, toDateTime64(0, 3, 'UTC')) AS last_inserted_at,
    if(empty(a.quantiles), NULL, a.quantiles[1]) AS arrival_p50_s,
    if(empty(a.quantiles), NULL, a.quantiles[2]) AS arrival_p95_s
FROM
(
    SELECT 'frames' AS topic, max(arrived_at) AS last_at FROM frames
    UNION ALL SELECT 'detections', max(detected_at) FROM detections
    UNION ALL SELECT 'batches', max(ended_at) FROM batches
    UNION ALL SELECT 'contexts', max(ended_at) FROM contexts
    UNION ALL SELECT 'risk_events', max(judged_at) FROM risk_events
    UNION ALL SELECT 'labels', max(labelled_at) FROM labels
    UNION ALL SELECT 'alerts', max(decided_at) FROM alerts
    UNION ALL SELECT 'prompts', max(created_at) FROM prompts
    UNION ALL SELECT 'cameras', max(updated_at) FROM cameras
    UNION ALL SELECT 'replays', max(updated_at) FROM replays
    UNION ALL SELECT 'replay_units', max(created_at) FROM replay_units
    UNION ALL SELECT 'replay_events', max(judged_at) FROM replay_events
    UNION ALL SELECT 'gpu_metrics', max(read_at) FROM gpu_metrics
    UNION ALL SELECT 'dead_letters', max(failed_at) FROM dead_letters
    UNION ALL SELECT 'dead_letter_status', max(at) FROM dead_letter_status
    UNION ALL SELECT 'holds', max(at) FROM holds
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
    -- Folded by hand: FINAL would read the whole table for one hour of it.
    SELECT 'detections' AS topic, quantilesExact(0.5, 0.95)(toFloat64(detected_at) - toFloat64(arrived_at)) AS quantiles
    FROM
    (
        SELECT detected_at, arrived_at
        FROM detections
        WHERE detected_at > (SELECT max(detected_at) FROM detections) - INTERVAL 1 HOUR
        LIMIT 1 BY camera_id, frame_id
    )
    HAVING count() > 0
    UNION ALL
    -- An event is as old as the last frame that it was made from.
    SELECT 'risk_events', quantilesExact(0.5, 0.95)(toFloat64(e.judged_at) - toFloat64(f.arrived_at))
    FROM
    (
        SELECT camera_id, frame_ids[-1] AS frame_id, judged_at
        FROM risk_events FINAL
        WHERE run = 'live' AND judged_at > (SELECT max(judged_at) FROM risk_events) - INTERVAL 1 HOUR
    ) AS e
    ANY INNER JOIN
    (
        SELECT camera_id, frame_id, arrived_at
        FROM frames
        WHERE (camera_id, frame_id) IN
        (
            SELECT camera_id, frame_ids[-1]
            FROM risk_events
            WHERE run = 'live' AND judged_at > (SELECT max(judged_at) FROM risk_events) - INTERVAL 1 HOUR
        )
    ) AS f ON f.camera_id = e.camera_id AND f.frame_id = e.frame_id
    HAVING count() > 0
) AS a ON a.topic = t.topic
COMMENT 'How far each topic has come, and how long records take from a frame''s arrival.';
