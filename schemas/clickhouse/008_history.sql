-- What was known and what was in force at any time, and what each version of the prompt made of the same windows.
--
-- Views with parameters are asked like functions, and want all of them:
--     SELECT * FROM events_as_of(at = '2026-11-02T18:00:00+01:00')
--     SELECT * FROM events_by_prompt(prompt = 'default')
-- A time is whatever `parseDateTime64BestEffort` takes, UTC where it names no zone: a day, a time, seconds since 1970,
-- or an expression, as now('UTC'). DESCRIBE cannot tell comments of the columns of such views; SHOW CREATE VIEW does.
--
-- A topic that was made anew (another epoch) begins with nothing, and what its earlier life said is in force no more:
-- the views of prompts and cameras read the newest life that had begun by then. Lives are ordered by when ClickHouse
-- first heard of them, and within one the log's order counts, as it does for the stages.
--
-- Measured with 1,000,000 verdicts of ten replays and 100,000 live events, on two busy cores: a window's history 70 ms
-- (with its camera; 170 ms without), all of `replay_state` 150, `events_as_of` 200, `events_by_prompt` 500 and, with
-- all its columns, 1,900. An index on the window would save 80 ms where the camera is not named: it is not worth one.

CREATE OR REPLACE VIEW replay_state
(
    replay_id     String                 COMMENT 'The replay.',
    name          String                 COMMENT 'Its name for people.',
    state         LowCardinality(String) COMMENT 'planned, running, paused, cancelled, done or failed.',
    detail        String                 COMMENT 'Why it is in this state, in words.',
    created_at    DateTime64(3, 'UTC')   COMMENT 'When it was planned.',
    updated_at    DateTime64(3, 'UTC')   COMMENT 'When it came into this state.',
    kind          String                 COMMENT 'change, baseline or shadow.',
    mode          String                 COMMENT 'fast or strict.',
    entry         String                 COMMENT 'What it takes as it was recorded: contexts, detections or frames.',
    prompt_digest String                 COMMENT 'The prompt version that it judges with; empty: the one that each window was judged with.',
    prompt_name   String                 COMMENT 'Its name for people; empty where none was given.',
    llm           String                 COMMENT 'Address of another LLM; empty where it is the live one.',
    model         String                 COMMENT 'The model asked for there, or its file.',
    threshold     Nullable(Float64)      COMMENT 'Score from which a box matters; NULL: as it was.',
    idle_ms       Nullable(Int64)        COMMENT 'A window closes after this long without a frame that matters, milliseconds; NULL: as it was.',
    max_ms        Nullable(Int64)        COMMENT 'A window closes at this length, milliseconds; NULL: as it was.',
    detector      String                 COMMENT 'Another detector; empty: the detections as they were recorded.',
    scope_since   Nullable(DateTime64(3, 'UTC')) COMMENT 'Windows that began from then on; NULL: all.',
    scope_until   Nullable(DateTime64(3, 'UTC')) COMMENT 'Windows that began before; NULL: all.',
    cameras       Array(String)          COMMENT 'Of these cameras alone; empty: all.',
    `where`       String                 COMMENT 'Condition on the columns of `events`; empty: none.',
    sample        Nullable(UInt64)       COMMENT 'So many windows of those; NULL: all.',
    share         Float64                COMMENT 'Share of the LLM''s slots that it may hold; of a shadow, of the live windows that it judges.',
    max_tokens    Nullable(UInt64)       COMMENT 'It pauses when so many tokens were spent; NULL: no limit.',
    baseline      String                 COMMENT 'The replay that measured the noise for this one; empty: none.',
    windows       UInt64                 COMMENT 'Windows to judge, as far as known when it was planned.',
    frames        UInt64                 COMMENT 'Frames to look at again, or to cut anew.',
    units         UInt64                 COMMENT 'Units of work that were given out.',
    results       UInt64                 COMMENT 'Verdicts that came back.',
    reused        UInt64                 COMMENT 'Of them those that took a recorded verdict: no call was made.',
    failed        UInt64                 COMMENT 'Windows that could not be judged: they are dead letters of stage replay.',
    tokens        UInt64                 COMMENT 'Tokens spent, prompts and answers together.',
    seconds       Float64                COMMENT 'Time in which the LLM worked for it, all calls added up, seconds.',
    last_at       Nullable(DateTime64(3, 'UTC')) COMMENT 'When its newest call was answered; NULL: none was made.'
)
AS SELECT
    s.replay_id AS replay_id,
    s.name AS name,
    s.state AS state,
    s.detail AS detail,
    s.created_at AS created_at,
    s.updated_at AS updated_at,
    JSONExtractString(s.plan, 'kind') AS kind,
    JSONExtractString(s.plan, 'mode') AS mode,
    multiIf(
        detector != '', 'frames',
        isNotNull(threshold) OR isNotNull(idle_ms) OR isNotNull(max_ms), 'detections',
        'contexts'
    ) AS entry,
    JSONExtractString(s.plan, 'change', 'prompt') AS prompt_digest,
    p.name AS prompt_name,
    JSONExtractString(s.plan, 'change', 'llm', 'url') AS llm,
    if(
        JSONExtractString(s.plan, 'change', 'llm', 'model') != '',
        JSONExtractString(s.plan, 'change', 'llm', 'model'),
        JSONExtractString(s.plan, 'change', 'llm', 'model_path')
    ) AS model,
    JSONExtract(s.plan, 'change', 'threshold', 'Nullable(Float64)') AS threshold,
    JSONExtract(s.plan, 'change', 'idle_ms', 'Nullable(Int64)') AS idle_ms,
    JSONExtract(s.plan, 'change', 'max_ms', 'Nullable(Int64)') AS max_ms,
    JSONExtractString(s.plan, 'change', 'detector') AS detector,
    fromUnixTimestamp64Milli(JSONExtract(s.plan, 'scope', 'since', 'Nullable(Int64)'), 'UTC') AS scope_since,
    fromUnixTimestamp64Milli(JSONExtract(s.plan, 'scope', 'until', 'Nullable(Int64)'), 'UTC') AS scope_until,
    JSONExtract(s.plan, 'scope', 'cameras', 'Array(String)') AS cameras,
    JSONExtractString(s.plan, 'scope', 'where') AS `where`,
    JSONExtract(s.plan, 'scope', 'sample', 'Nullable(UInt64)') AS sample,
    JSONExtractFloat(s.plan, 'share') AS share,
    JSONExtract(s.plan, 'max_tokens', 'Nullable(UInt64)') AS max_tokens,
    JSONExtractString(s.plan, 'baseline') AS baseline,
    JSONExtractUInt(s.plan, 'windows') AS windows,
    JSONExtractUInt(s.plan, 'frames') AS frames,
    u.units AS units,
    e.results AS results,
    e.reused AS reused,
    f.failed AS failed,
    e.tokens AS tokens,
    e.seconds AS seconds,
    nullIf(e.last_at, toDateTime64(0, 3, 'UTC')) AS last_at
FROM
(
    SELECT
        replay_id, name, state, detail, plan, updated_at,
        min(updated_at) OVER (PARTITION BY replay_id) AS created_at
    FROM
    (
        SELECT *, min(inserted_at) OVER (PARTITION BY epoch) AS life FROM replays FINAL
    )
    ORDER BY life DESC, `offset` DESC
    LIMIT 1 BY replay_id
) AS s
LEFT ANY JOIN (SELECT digest, name FROM prompts FINAL WHERE kind = 'version') AS p ON p.digest = prompt_digest
LEFT ANY JOIN
(
    SELECT replay_id, count() AS units FROM replay_units FINAL GROUP BY replay_id
) AS u ON u.replay_id = s.replay_id
LEFT ANY JOIN
(
    -- A unit's letter has its name as its key, a shadow's as its origin. One that was redriven may have its verdict.
    SELECT splitByChar(':', unit)[1] AS replay_id, uniqExact(unit) AS failed
    FROM
    (
        SELECT if(startsWith(origin, 'replay_units:'), ifNull(key, ''), origin) AS unit
        FROM dead_letters
        WHERE stage = 'replay'
    )
    WHERE unit NOT IN
    (
        SELECT unit_id FROM replay_events WHERE unit_id IN
        (
            SELECT if(startsWith(origin, 'replay_units:'), ifNull(key, ''), origin)
            FROM dead_letters WHERE stage = 'replay'
        )
    )
    GROUP BY replay_id
) AS f ON f.replay_id = s.replay_id
LEFT ANY JOIN
(
    SELECT
        replay_id,
        count() AS results,
        countIf(replay_events.reused) AS reused,
        sumIf(prompt_tokens + completion_tokens, NOT replay_events.reused) AS tokens,
        sumIf(inference_ms, NOT replay_events.reused) / 1000 AS seconds,
        maxIf(judged_at, NOT replay_events.reused) AS last_at
    FROM replay_events FINAL
    GROUP BY replay_id
) AS e ON e.replay_id = s.replay_id
COMMENT 'One row per replay and shadow: its state, its plan, what it has done and what it took.';

CREATE OR REPLACE VIEW score_history
(
    camera_id      LowCardinality(String) COMMENT 'The camera.',
    batch_id       String                 COMMENT 'The window.',
    started_at     DateTime64(3, 'UTC')   COMMENT 'When its first frame was taken.',
    event_id       String                 COMMENT 'The verdict.',
    run            String                 COMMENT '`live`, or the replay''s id.',
    run_name       String                 COMMENT '`live`, or the replay''s name for people.',
    kind           String                 COMMENT 'live, change, baseline or shadow; empty where the replay''s plan is not kept any more.',
    prompt_digest  LowCardinality(String) COMMENT 'The prompt version that it was judged with.',
    prompt_name    String                 COMMENT 'Its name for people; empty where none was given.',
    model          LowCardinality(String) COMMENT 'The model that judged it.',
    model_digest   LowCardinality(String) COMMENT 'SHA-256 of its weights, hex.',
    verdict_digest LowCardinality(String) COMMENT 'Digest of prompt, schema, parameters and weights: equal means judged by the same.',
    risk_score     Int32                  COMMENT 'Risk, 0 to 100.',
    risk_level     LowCardinality(String) COMMENT 'low 0-29, medium 30-59, high 60-84, critical 85-100.',
    summary        String                 COMMENT 'What happened, in a sentence.',
    judged_at      DateTime64(3, 'UTC')   COMMENT 'When it was judged; of one that was reused, when that one was.',
    reused         Bool                   COMMENT 'Whether a recorded verdict was taken, not a new call made.'
)
AS SELECT
    h.camera_id AS camera_id,
    h.batch_id AS batch_id,
    h.started_at AS started_at,
    h.event_id AS event_id,
    h.run AS run,
    if(h.run = 'live', 'live', r.name) AS run_name,
    if(h.run = 'live', 'live', r.kind) AS kind,
    h.prompt_digest AS prompt_digest,
    p.name AS prompt_name,
    h.model AS model,
    h.model_digest AS model_digest,
    h.verdict_digest AS verdict_digest,
    h.risk_score AS risk_score,
    h.risk_level AS risk_level,
    h.summary AS summary,
    h.judged_at AS judged_at,
    h.reused AS reused
FROM
(
    SELECT
        camera_id, batch_id, started_at, event_id, 'live' AS run, prompt_digest, model, model_digest, verdict_digest,
        risk_score, risk_level, summary, judged_at, false AS reused
    FROM risk_events FINAL
    WHERE risk_events.run = 'live'
    UNION ALL
    SELECT
        camera_id, batch_id, started_at, event_id, toString(replay_id), prompt_digest, model, model_digest,
        verdict_digest, risk_score, risk_level, summary, judged_at, reused
    FROM replay_events FINAL
) AS h
LEFT ANY JOIN
(
    SELECT
        toString(replay_id) AS replay_id,
        argMax(name, (inserted_at, `offset`)) AS name,
        argMax(JSONExtractString(plan, 'kind'), (inserted_at, `offset`)) AS kind
    FROM replays FINAL
    GROUP BY replay_id
) AS r ON r.replay_id = h.run
LEFT ANY JOIN (SELECT digest, name FROM prompts FINAL WHERE kind = 'version') AS p ON p.digest = h.prompt_digest
COMMENT 'Every verdict on a window: the live one, and those of replays and shadows.';

CREATE OR REPLACE VIEW events_by_prompt_as_of
(
    camera_id      LowCardinality(String) COMMENT 'The camera.',
    batch_id       String                 COMMENT 'The window.',
    started_at     DateTime64(3, 'UTC')   COMMENT 'When its first frame was taken.',
    event_id       String                 COMMENT 'The verdict.',
    run            String                 COMMENT '`live`, or the replay''s id.',
    run_name       String                 COMMENT '`live`, or the replay''s name for people.',
    kind           String                 COMMENT 'live, change, baseline or shadow; empty where the replay''s plan is not kept any more.',
    prompt_digest  LowCardinality(String) COMMENT 'The prompt version that it was judged with.',
    prompt_name    String                 COMMENT 'Its name for people; empty where none was given.',
    model          LowCardinality(String) COMMENT 'The model that judged it.',
    model_digest   LowCardinality(String) COMMENT 'SHA-256 of its weights, hex.',
    verdict_digest LowCardinality(String) COMMENT 'Digest of prompt, schema, parameters and weights: equal means judged by the same.',
    risk_score     Int32                  COMMENT 'Risk, 0 to 100.',
    risk_level     LowCardinality(String) COMMENT 'low 0-29, medium 30-59, high 60-84, critical 85-100.',
    summary        String                 COMMENT 'What happened, in a sentence.',
    judged_at      DateTime64(3, 'UTC')   COMMENT 'When it was judged; of one that was reused, when that one was.',
    reused         Bool                   COMMENT 'Whether a recorded verdict was taken, not a new call made.'
)
AS WITH
    parseDateTime64BestEffort({at:String}, 3, 'UTC') AS moment,
    (
        SELECT argMax(digest, created_at) FROM prompts
        WHERE kind = 'version' AND name = {prompt:String} AND name != '' AND created_at <= moment
    ) AS named
SELECT *
FROM score_history
WHERE judged_at <= moment AND if(named != '', prompt_digest = named, startsWith(prompt_digest, {prompt:String}))
ORDER BY judged_at DESC, reused
LIMIT 1 BY camera_id, batch_id
COMMENT 'What one prompt version had made of each window by a time: its newest verdict, live or replayed. Parameters: prompt (a name, of which the newest version counts; else a digest or its beginning; empty: any version), at.';

CREATE OR REPLACE VIEW events_by_prompt
(
    camera_id      LowCardinality(String) COMMENT 'The camera.',
    batch_id       String                 COMMENT 'The window.',
    started_at     DateTime64(3, 'UTC')   COMMENT 'When its first frame was taken.',
    event_id       String                 COMMENT 'The verdict.',
    run            String                 COMMENT '`live`, or the replay''s id.',
    run_name       String                 COMMENT '`live`, or the replay''s name for people.',
    kind           String                 COMMENT 'live, change, baseline or shadow; empty where the replay''s plan is not kept any more.',
    prompt_digest  LowCardinality(String) COMMENT 'The prompt version that it was judged with.',
    prompt_name    String                 COMMENT 'Its name for people; empty where none was given.',
    model          LowCardinality(String) COMMENT 'The model that judged it.',
    model_digest   LowCardinality(String) COMMENT 'SHA-256 of its weights, hex.',
    verdict_digest LowCardinality(String) COMMENT 'Digest of prompt, schema, parameters and weights: equal means judged by the same.',
    risk_score     Int32                  COMMENT 'Risk, 0 to 100.',
    risk_level     LowCardinality(String) COMMENT 'low 0-29, medium 30-59, high 60-84, critical 85-100.',
    summary        String                 COMMENT 'What happened, in a sentence.',
    judged_at      DateTime64(3, 'UTC')   COMMENT 'When it was judged; of one that was reused, when that one was.',
    reused         Bool                   COMMENT 'Whether a recorded verdict was taken, not a new call made.'
)
AS SELECT * FROM events_by_prompt_as_of(prompt = {prompt:String}, at = '2299-12-31')
COMMENT 'What one prompt version made of each window: its newest verdict, live or replayed. Parameter: prompt (a name, of which the newest version counts; else a digest or its beginning; empty: any version).';

CREATE OR REPLACE VIEW events_as_of
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
    judged_at          DateTime64(3, 'UTC')   COMMENT 'When it was judged.',
    label              String                 COMMENT 'The newest label on the window by then: true_alarm, false_alarm or missed; empty where it had none.',
    label_author       String                 COMMENT 'Who gave it; empty where unknown.',
    label_note         String                 COMMENT 'Free text.',
    labelled_at        Nullable(DateTime64(3, 'UTC')) COMMENT 'When it was given; NULL: there was none.'
)
AS WITH parseDateTime64BestEffort({at:String}, 3, 'UTC') AS moment
SELECT
    e.*,
    l.newest.1 AS label,
    l.newest.2 AS label_author,
    l.newest.3 AS label_note,
    nullIf(l.newest.4, toDateTime64(0, 3, 'UTC')) AS labelled_at
FROM (SELECT * FROM events WHERE judged_at <= moment) AS e
LEFT ANY JOIN
(
    SELECT
        camera_id,
        -- A label on a replay's verdict is one on the window that it judged; runs have no colon.
        arrayStringConcat(arrayPopBack(splitByChar(':', assumeNotNull(event_id))), ':') AS batch_id,
        argMax(
            (toString(verdict), toString(author), note, labels.labelled_at), (labels.labelled_at, label_id)
        ) AS newest
    FROM labels FINAL
    WHERE isNotNull(event_id) AND labels.labelled_at <= moment
    GROUP BY camera_id, batch_id
) AS l ON l.camera_id = e.camera_id AND l.batch_id = e.batch_id
COMMENT 'The live events that were known at a time, with the labels that they had then. Parameter: at.';

CREATE OR REPLACE VIEW cameras_as_of
(
    camera_id               LowCardinality(String) COMMENT 'Its id.',
    name                    String COMMENT 'A name for people.',
    time_zone               LowCardinality(String) COMMENT 'IANA time zone.',
    `zones.name`            Array(String) COMMENT 'Names of its zones.',
    `zones.polygon`         Array(Array(Float64)) COMMENT 'Their corners: x0, y0, x1, y1, ... as fractions of width and height.',
    window_open_on          Array(LowCardinality(String)) COMMENT 'Classes that matter.',
    window_threshold        Float64 COMMENT 'Least score at which a detection matters, 0 to 1.',
    window_idle_ms          Int64 COMMENT 'A window closes after this long without a frame that matters, milliseconds.',
    window_max_ms           Int64 COMMENT 'A window closes at this length, milliseconds.',
    window_max_frames       Int32 COMMENT 'A window closes at this many frames.',
    window_fast_label       String COMMENT 'Class whose sure sighting closes a window at once; empty turns the fast path off.',
    window_fast_score       Float64 COMMENT 'Score from which a sighting is sure, 0 to 1.',
    window_fast_cooldown_ms Int64 COMMENT 'At most one fast close per camera in this long, milliseconds.',
    window_stationary_iou   Float64 COMMENT 'Intersection over union from which a box counts as not moved, 0 to 1.',
    partition_pin           Nullable(Int32) COMMENT 'Partition pin; NULL: murmur2 of the id.',
    since                   DateTime64(3, 'UTC') COMMENT 'When this was set.'
)
AS WITH parseDateTime64BestEffort({at:String}, 3, 'UTC') AS moment
SELECT
    camera_id, name, time_zone, zones.name, zones.polygon, window_open_on, window_threshold, window_idle_ms,
    window_max_ms, window_max_frames, window_fast_label, window_fast_score, window_fast_cooldown_ms,
    window_stationary_iou, partition_pin, updated_at AS since
FROM cameras FINAL
WHERE updated_at <= moment AND epoch =
(
    SELECT argMax(epoch, came)
    FROM (SELECT epoch, min(inserted_at) AS came FROM cameras GROUP BY epoch HAVING min(updated_at) <= moment)
)
ORDER BY `offset` DESC
LIMIT 1 BY camera_id
COMMENT 'What was set for each camera at a time. Parameter: at.';

CREATE OR REPLACE VIEW prompts_as_of
(
    camera_id LowCardinality(String) COMMENT 'The camera; `default` stands for every one without a pointer of its own.',
    scope     LowCardinality(String) COMMENT 'Whose pointer it is: the camera''s own, or default; empty where nobody had chosen.',
    digest    String                 COMMENT 'The version that was in force; empty where nobody had chosen: then it is the one that comes with the product.',
    name      String                 COMMENT 'Its name for people.',
    since     Nullable(DateTime64(3, 'UTC')) COMMENT 'When the pointer was moved there.',
    comment   String                 COMMENT 'Why.',
    evidence  String                 COMMENT 'The replay that it was moved on the strength of; empty where none was named.'
)
AS WITH
    parseDateTime64BestEffort({at:String}, 3, 'UTC') AS moment,
    pointers AS
    (
        SELECT toString(scope) AS scope, digest, created_at, comment, evidence
        FROM prompts FINAL
        WHERE kind = 'active' AND created_at <= moment AND epoch =
        (
            SELECT argMax(epoch, came)
            FROM (SELECT epoch, min(inserted_at) AS came FROM prompts GROUP BY epoch HAVING min(created_at) <= moment)
        )
        ORDER BY `offset` DESC
        LIMIT 1 BY scope
    ),
    known AS
    (
        SELECT 'default' AS camera_id
        UNION DISTINCT SELECT scope FROM pointers
        UNION DISTINCT SELECT toString(camera_id) FROM cameras WHERE updated_at <= moment
        UNION DISTINCT SELECT toString(camera_id) FROM risk_events WHERE run = 'live' AND judged_at <= moment
    )
SELECT
    k.camera_id AS camera_id,
    p.scope AS scope,
    p.digest AS digest,
    v.name AS name,
    nullIf(p.created_at, toDateTime64(0, 3, 'UTC')) AS since,
    p.comment AS comment,
    p.evidence AS evidence
FROM
(
    -- An empty digest takes a camera's own pointer back.
    SELECT camera_id, if(camera_id IN (SELECT scope FROM pointers WHERE digest != ''), camera_id, 'default') AS scope
    FROM known
) AS k
LEFT ANY JOIN (SELECT * FROM pointers) AS p ON p.scope = k.scope
LEFT ANY JOIN (SELECT digest, name FROM prompts FINAL WHERE kind = 'version') AS v ON v.digest = p.digest
COMMENT 'Which prompt version was in force for each camera at a time, and why. Parameter: at.';
