-- A typed table for each topic that is kept. Columns follow the record's fields by rule (processors/sink/core.py):
-- a time is DateTime64 in UTC, a list of records is one array a field (`boxes.label`), a record inside is prefixed.
-- Each type holds whatever its Avro type can. Times outside 1900 to 2299 are shown as the nearest bound; the exact
-- value is in `log`.
--
-- The sorting key begins with what is usually asked for, ends in the record's id, and follows from the id alone: so a
-- record that reached the log twice is one row under FINAL. Times that do not follow from the id are not in it;
-- frames and detections, by far the most rows, have a partition for each month of arrival, which prunes instead, and
-- FINAL folds across partitions. Topics whose history is the product are keyed by position: each record is a row.
--
-- non_replicated_deduplication_window: a table has one topic, so at most 64 ranges are in flight in production
-- (1,024 partitions at the very most): 10,240 is ten times the most. Why fsync: see 001_log.sql.

CREATE TABLE IF NOT EXISTS frames
(
    frame_id      String COMMENT 'Camera, SHA-256 of the bytes and, where known, capture time.',
    camera_id     LowCardinality(String) COMMENT 'The camera.',
    sha256        String COMMENT 'SHA-256 of the image bytes, hex.',
    size          Int64 COMMENT 'Length of the image, bytes.',
    width         Int32 COMMENT 'Image width, pixels.',
    height        Int32 COMMENT 'Image height, pixels.',
    captured_at   Nullable(DateTime64(3, 'UTC')) COMMENT 'Capture time by EXIF, client or file name, null where none gives one, UTC.',
    captured_from LowCardinality(String) COMMENT 'Where the capture time is from: exif, client, filename or none.',
    file_at       Nullable(DateTime64(3, 'UTC')) COMMENT 'The file''s modification time, UTC.',
    arrived_at    DateTime64(3, 'UTC') COMMENT 'When ingest took it, UTC.',
    inline        Bool COMMENT 'Whether the image is inside the record in `log`.',
    claim         Nullable(String) COMMENT 'Content-addressed URI of the image where it is not inline.',
    source        LowCardinality(String) COMMENT 'How it came: folder, upload, snapshot or video.',
    source_name   String COMMENT 'The file''s name as it came; empty where there was none.',
    epoch         LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`   Int32 COMMENT 'Its partition.',
    `offset`      Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at   DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree PARTITION BY toYYYYMM(arrived_at) ORDER BY (camera_id, frame_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per frame. The image itself is in `log`, or where the claim says.';

CREATE TABLE IF NOT EXISTS detections
(
    frame_id       String COMMENT 'The frame.',
    camera_id      LowCardinality(String) COMMENT 'The camera.',
    captured_at    Nullable(DateTime64(3, 'UTC')) COMMENT 'The frame''s capture time, UTC.',
    arrived_at     DateTime64(3, 'UTC') COMMENT 'When ingest took the frame, UTC.',
    width          Int32 COMMENT 'Image width, pixels.',
    height         Int32 COMMENT 'Image height, pixels.',
    `boxes.label`  Array(LowCardinality(String)) COMMENT 'Class name, as the model''s id2label has it (COCO names).',
    `boxes.score`  Array(Float64) COMMENT 'Confidence, 0 to 1.',
    `boxes.x`      Array(Float32) COMMENT 'Left edge, pixels of the original image.',
    `boxes.y`      Array(Float32) COMMENT 'Top edge, pixels of the original image.',
    `boxes.width`  Array(Float32) COMMENT 'Width, pixels of the original image.',
    `boxes.height` Array(Float32) COMMENT 'Height, pixels of the original image.',
    model          LowCardinality(String) COMMENT 'Name of the model.',
    model_digest   LowCardinality(String) COMMENT 'SHA-256 of the weights, hex.',
    runtime        LowCardinality(String) COMMENT 'What ran it: torch-cpu, torch-cuda or http.',
    inference_ms   Float64 COMMENT 'This frame''s share of its batch''s inference, milliseconds.',
    detected_at    DateTime64(3, 'UTC') COMMENT 'Wall time of the inference, UTC.',
    epoch          LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`    Int32 COMMENT 'Its partition.',
    `offset`       Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at    DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree PARTITION BY toYYYYMM(arrived_at) ORDER BY (camera_id, frame_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per frame that the detector looked at, also when it saw nothing.';

CREATE TABLE IF NOT EXISTS batches
(
    batch_id             String COMMENT 'Camera and digest of the ordered frame ids.',
    camera_id            LowCardinality(String) COMMENT 'The camera.',
    started_at           DateTime64(3, 'UTC') COMMENT 'Event time of the first frame, UTC.',
    ended_at             DateTime64(3, 'UTC') COMMENT 'Event time of the last frame that matters, UTC.',
    `frames.frame_id`    Array(String) COMMENT 'The frame''s id.',
    `frames.offset`      Array(Int64) COMMENT 'Offset of its record on `detections`, in the batch''s partition.',
    `frames.event_at`    Array(DateTime64(3, 'UTC')) COMMENT 'Its event time, UTC.',
    `frames.width`       Array(Int32) COMMENT 'Image width, pixels.',
    `frames.height`      Array(Int32) COMMENT 'Image height, pixels.',
    `frames.matters`     Array(Bool) COMMENT 'Whether it held a detection that matters.',
    `frames.late`        Array(Bool) COMMENT 'Whether its capture time lay before the camera''s event time, and was lifted to it.',
    `frames.boxes`       Array(Array(Tuple(label LowCardinality(String), score Float64, x Float32, y Float32, width Float32, height Float32, stationary Bool))) COMMENT 'Its boxes of at least the threshold.',
    closed_by            LowCardinality(String) COMMENT 'Why it closed: idle, length, frames, fast_path, tick or end_of_stream.',
    closed_at_offset     Int64 COMMENT 'Offset on `detections` of the record that closed it.',
    detections_partition Int32 COMMENT 'Partition of `detections`, and of every topic for this camera.',
    detections_epoch     LowCardinality(String) COMMENT 'Epoch of `detections` when it was read.',
    settings_digest      LowCardinality(String) COMMENT 'Digest of the window settings it was made with.',
    epoch                LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`          Int32 COMMENT 'Its partition.',
    `offset`             Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at          DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (camera_id, batch_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per closed window of a camera.';

CREATE TABLE IF NOT EXISTS contexts
(
    batch_id            String COMMENT 'The batch.',
    camera_id           LowCardinality(String) COMMENT 'The camera.',
    started_at          DateTime64(3, 'UTC') COMMENT 'Event time of the first frame, UTC.',
    ended_at            DateTime64(3, 'UTC') COMMENT 'Event time of the last frame that matters, UTC.',
    frame_ids           Array(String) COMMENT 'The batch''s frames, in order; the batch itself is in `batches`.',
    camera_name         LowCardinality(String) COMMENT 'The camera''s name for people.',
    time_zone           LowCardinality(String) COMMENT 'IANA time zone of the camera.',
    `sections.name`     Array(String) COMMENT 'What it is: captions, zones, re-identification, baseline, memory.',
    `sections.text`     Array(String) COMMENT 'The text, ready for the prompt.',
    `sections.priority` Array(Int32) COMMENT 'Sections of the lowest priority are dropped first when the context is full.',
    `sections.made_by`  Array(LowCardinality(String)) COMMENT 'Enricher and version.',
    epoch               LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`         Int32 COMMENT 'Its partition.',
    `offset`            Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at         DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (camera_id, batch_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per window as the LLM was to be told of it.';

CREATE TABLE IF NOT EXISTS risk_events
(
    event_id           String COMMENT 'Batch id and run.',
    batch_id           String COMMENT 'The batch that was judged.',
    camera_id          LowCardinality(String) COMMENT 'The camera.',
    run                LowCardinality(String) COMMENT '`live`, or a replay''s id.',
    started_at         DateTime64(3, 'UTC') COMMENT 'Event time of the batch''s first frame, UTC.',
    ended_at           DateTime64(3, 'UTC') COMMENT 'Event time of the batch''s last frame that matters, UTC.',
    frame_ids          Array(String) COMMENT 'The batch''s frames, in order.',
    risk_score         Int32 COMMENT '0 to 100, from the model.',
    risk_level         LowCardinality(String) COMMENT 'Computed from the score: low 0-29, medium 30-59, high 60-84, critical 85-100.',
    summary            String COMMENT 'What happened, in a sentence.',
    reasoning          String CODEC(ZSTD(1)) COMMENT 'Why the score is what it is.',
    risk_factors       Array(String) COMMENT 'What raised or lowered the risk.',
    entities           Array(String) COMMENT 'Who and what was there.',
    recommended_action LowCardinality(String) COMMENT 'none, review, notify or call.',
    verdict_digest     LowCardinality(String) COMMENT 'Digest of template, schema, parameters and weights: what judged it.',
    prompt_digest      LowCardinality(String) COMMENT 'The prompt version.',
    model              LowCardinality(String) COMMENT 'Name of the model as the server gives it.',
    model_digest       LowCardinality(String) COMMENT 'SHA-256 of the weights, hex; empty where the server''s weights cannot be read.',
    parameters         String CODEC(ZSTD(1)) COMMENT 'Sampling parameters, JSON.',
    conditions         Map(LowCardinality(String), String) COMMENT 'Conditions of its making: slots, prompt cache, seed, server build, threads, device.',
    rendered_prompt    String CODEC(ZSTD(1)) COMMENT 'The messages sent, JSON.',
    raw_completion     String CODEC(ZSTD(1)) COMMENT 'The text that came back, byte for byte.',
    dropped_sections   Array(String) COMMENT 'Sections left out to fit the context.',
    repaired           Bool COMMENT 'Whether the first completion was unusable and the second was taken.',
    prompt_tokens      Int32 COMMENT 'Tokens of the prompt.',
    completion_tokens  Int32 COMMENT 'Tokens of the completion.',
    cached_tokens      Int32 COMMENT 'Tokens of the prompt that the server had cached.',
    queued_ms          Float64 COMMENT 'Wait for a slot, milliseconds.',
    inference_ms       Float64 COMMENT 'From request to answer, milliseconds.',
    judged_at          DateTime64(3, 'UTC') COMMENT 'Wall time of the verdict, UTC.',
    epoch              LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`        Int32 COMMENT 'Its partition.',
    `offset`           Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at        DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (camera_id, event_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per live verdict, with the lineage of its making. People read the view `events`.';

CREATE TABLE IF NOT EXISTS labels
(
    label_id    String COMMENT 'Digest of camera, span, verdict, author and time.',
    camera_id   LowCardinality(String) COMMENT 'The camera.',
    started_at  DateTime64(3, 'UTC') COMMENT 'Start of the span, event time, UTC.',
    ended_at    DateTime64(3, 'UTC') COMMENT 'End of the span, event time, UTC.',
    verdict     LowCardinality(String) COMMENT 'true_alarm, false_alarm or missed.',
    event_id    Nullable(String) COMMENT 'The event it was given on, where it was given on one.',
    author      LowCardinality(String) COMMENT 'Who says so; empty where unknown.',
    note        String COMMENT 'Free text.',
    labelled_at DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch       LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition` Int32 COMMENT 'Its partition.',
    `offset`    Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (camera_id, started_at, label_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per verdict of a person.';

CREATE TABLE IF NOT EXISTS alerts
(
    alert_id    String COMMENT 'Digest of event, rule and channel.',
    event_id    String COMMENT 'The event.',
    camera_id   LowCardinality(String) COMMENT 'The camera.',
    rule        LowCardinality(String) COMMENT 'Name of the rule.',
    channel     LowCardinality(String) COMMENT 'Where it would go.',
    decision    LowCardinality(String) COMMENT 'sent or suppressed.',
    reason      String COMMENT 'Why.',
    decided_at  DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch       LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition` Int32 COMMENT 'Its partition.',
    `offset`    Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (camera_id, alert_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per notification decided.';

CREATE TABLE IF NOT EXISTS prompts
(
    kind          LowCardinality(String) COMMENT 'version or active.',
    digest        String COMMENT 'Digest of the version that this is, or that it points to.',
    scope         LowCardinality(String) COMMENT 'For a pointer: `default`, or a camera''s id; empty for a version.',
    name          String COMMENT 'A name for people; empty for a pointer.',
    template      String CODEC(ZSTD(1)) COMMENT 'The version''s templates (system, user, repair) and section priorities, JSON; empty for a pointer.',
    output_schema String CODEC(ZSTD(1)) COMMENT 'JSON schema of the completion; empty for a pointer.',
    parameters    String CODEC(ZSTD(1)) COMMENT 'Sampling parameters, JSON; empty for a pointer.',
    comment       String COMMENT 'Why.',
    created_at    DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch         LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`   Int32 COMMENT 'Its partition.',
    `offset`      Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at   DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (digest, epoch, `partition`, `offset`)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'The history of prompts: every version and every move of a pointer.';

CREATE TABLE IF NOT EXISTS cameras
(
    camera_id               LowCardinality(String) COMMENT 'Its id: lower-case letters, digits, - and _.',
    name                    String COMMENT 'A name for people.',
    time_zone               LowCardinality(String) COMMENT 'IANA time zone.',
    `zones.name`            Array(String) COMMENT 'Its name.',
    `zones.polygon`         Array(Array(Float64)) COMMENT 'x0, y0, x1, y1, ... as fractions of width and height.',
    window_open_on          Array(LowCardinality(String)) COMMENT 'Classes that matter.',
    window_threshold        Float64 COMMENT 'Least score at which a detection matters, 0 to 1.',
    window_idle_ms          Int64 COMMENT 'A window closes after this long without a frame that matters, milliseconds.',
    window_max_ms           Int64 COMMENT 'A window closes at this length, milliseconds.',
    window_max_frames       Int32 COMMENT 'A window closes at this many frames.',
    window_fast_label       String COMMENT 'Class whose sure sighting closes a window at once; empty turns the fast path off.',
    window_fast_score       Float64 COMMENT 'Score from which a sighting is sure, 0 to 1.',
    window_fast_cooldown_ms Int64 COMMENT 'At most one fast close per camera in this long, milliseconds.',
    window_stationary_iou   Float64 COMMENT 'Intersection over union from which a box counts as not moved, 0 to 1.',
    partition_pin           Nullable(Int32) COMMENT 'Partition pin; only before its first frame. Null: murmur2 of the id.',
    updated_at              DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch                   LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`             Int32 COMMENT 'Its partition.',
    `offset`                Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at             DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (camera_id, epoch, `partition`, `offset`)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'The history of camera settings; the newest row of a camera is in force.';

CREATE TABLE IF NOT EXISTS replays
(
    replay_id   LowCardinality(String) COMMENT 'Its id.',
    name        String COMMENT 'A name for people.',
    state       LowCardinality(String) COMMENT 'planned, running, paused, cancelled, done or failed.',
    plan        String CODEC(ZSTD(1)) COMMENT 'Range, cameras, change, items, time and tokens, JSON.',
    updated_at  DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch       LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition` Int32 COMMENT 'Its partition.',
    `offset`    Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (replay_id, epoch, `partition`, `offset`)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'The history of replays; the newest row of one is its state.';

CREATE TABLE IF NOT EXISTS replay_units
(
    unit_id      String COMMENT 'Replay and what is judged or cut.',
    replay_id    LowCardinality(String) COMMENT 'The replay.',
    camera_id    LowCardinality(String) COMMENT 'The camera.',
    kind         LowCardinality(String) COMMENT 'judge or cut.',
    payload_size Int64 COMMENT 'Length of the payload, bytes; the payload is in the record in `log`.',
    created_at   DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch        LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`  Int32 COMMENT 'Its partition.',
    `offset`     Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at  DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (replay_id, unit_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per unit of a replay''s work.';

CREATE TABLE IF NOT EXISTS replay_events
(
    replay_id          LowCardinality(String) COMMENT 'The replay.',
    unit_id            String COMMENT 'The unit.',
    event_id           String COMMENT 'The event''s id.',
    camera_id          LowCardinality(String) COMMENT 'The camera.',
    reused             Bool COMMENT 'Whether a recorded verdict was taken, not a new call made.',
    batch_id           String COMMENT 'The batch that was judged.',
    run                LowCardinality(String) COMMENT '`live`, or a replay''s id.',
    started_at         DateTime64(3, 'UTC') COMMENT 'Event time of the batch''s first frame, UTC.',
    ended_at           DateTime64(3, 'UTC') COMMENT 'Event time of the batch''s last frame that matters, UTC.',
    frame_ids          Array(String) COMMENT 'The batch''s frames, in order.',
    risk_score         Int32 COMMENT '0 to 100, from the model.',
    risk_level         LowCardinality(String) COMMENT 'Computed from the score: low 0-29, medium 30-59, high 60-84, critical 85-100.',
    summary            String COMMENT 'What happened, in a sentence.',
    reasoning          String CODEC(ZSTD(1)) COMMENT 'Why the score is what it is.',
    risk_factors       Array(String) COMMENT 'What raised or lowered the risk.',
    entities           Array(String) COMMENT 'Who and what was there.',
    recommended_action LowCardinality(String) COMMENT 'none, review, notify or call.',
    verdict_digest     LowCardinality(String) COMMENT 'Digest of template, schema, parameters and weights: what judged it.',
    prompt_digest      LowCardinality(String) COMMENT 'The prompt version.',
    model              LowCardinality(String) COMMENT 'Name of the model as the server gives it.',
    model_digest       LowCardinality(String) COMMENT 'SHA-256 of the weights, hex; empty where the server''s weights cannot be read.',
    parameters         String CODEC(ZSTD(1)) COMMENT 'Sampling parameters, JSON.',
    conditions         Map(LowCardinality(String), String) COMMENT 'Conditions of its making: slots, prompt cache, seed, server build, threads, device.',
    rendered_prompt    String CODEC(ZSTD(1)) COMMENT 'The messages sent, JSON.',
    raw_completion     String CODEC(ZSTD(1)) COMMENT 'The text that came back, byte for byte.',
    dropped_sections   Array(String) COMMENT 'Sections left out to fit the context.',
    repaired           Bool COMMENT 'Whether the first completion was unusable and the second was taken.',
    prompt_tokens      Int32 COMMENT 'Tokens of the prompt.',
    completion_tokens  Int32 COMMENT 'Tokens of the completion.',
    cached_tokens      Int32 COMMENT 'Tokens of the prompt that the server had cached.',
    queued_ms          Float64 COMMENT 'Wait for a slot, milliseconds.',
    inference_ms       Float64 COMMENT 'From request to answer, milliseconds.',
    judged_at          DateTime64(3, 'UTC') COMMENT 'Wall time of the verdict, UTC.',
    epoch              LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`        Int32 COMMENT 'Its partition.',
    `offset`           Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at        DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (replay_id, camera_id, event_id)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per verdict of a replay.';

CREATE TABLE IF NOT EXISTS gpu_metrics
(
    host         LowCardinality(String) COMMENT 'Host name.',
    device       Int32 COMMENT 'Index on the host.',
    name         String COMMENT 'Product name.',
    utilization  Float64 COMMENT 'Share of time that kernels ran, 0 to 1.',
    memory_used  Int64 COMMENT 'Bytes.',
    memory_total Int64 COMMENT 'Bytes.',
    temperature  Float64 COMMENT 'Degrees Celsius.',
    power        Float64 COMMENT 'Watts.',
    read_at      DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch        LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition`  Int32 COMMENT 'Its partition.',
    `offset`     Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at  DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (host, device, read_at)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row per reading of a device.';

CREATE TABLE IF NOT EXISTS dead_letters
(
    origin      String COMMENT 'topic:epoch:partition:offset of the record, or source:name for what never became one.',
    camera_id   LowCardinality(String) COMMENT 'The camera, where it could be told; else empty.',
    stage       LowCardinality(String) COMMENT 'Who could not process it.',
    kind        LowCardinality(String) COMMENT 'error, gap, rejected or shed.',
    error       LowCardinality(String) COMMENT 'The error''s class.',
    message     String COMMENT 'What it said, and the fix where one is known.',
    attempt     Int32 COMMENT 'How often it was tried.',
    `key`       Nullable(String) COMMENT 'The original key.',
    `value`     Nullable(String) CODEC(ZSTD(1)) COMMENT 'The original bytes, up to 256 KB.',
    claim       Nullable(String) COMMENT 'URI of the original bytes where they are larger.',
    headers     Array(Tuple(name String, value String)) COMMENT 'The original headers.',
    detail      String COMMENT 'What is known besides, JSON: a raw completion, a range of offsets.',
    failed_at   DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch       LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition` Int32 COMMENT 'Its partition.',
    `offset`    Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (stage, origin, epoch, `partition`, `offset`)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'Every record that could not be processed, each time it was set aside.';

CREATE TABLE IF NOT EXISTS dead_letter_status
(
    origin      String COMMENT 'As in `dead_letters`.',
    status      LowCardinality(String) COMMENT 'redriven, resolved or discarded.',
    `by`        LowCardinality(String) COMMENT 'Who says so: a stage or the CLI.',
    at          DateTime64(3, 'UTC') COMMENT 'Wall time, UTC.',
    epoch       LowCardinality(String) COMMENT 'Which life of the topic the record is from.',
    `partition` Int32 COMMENT 'Its partition.',
    `offset`    Int64 COMMENT 'Its offset: with epoch and partition it finds the original bytes in `log`.',
    inserted_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (origin, epoch, `partition`, `offset`)
SETTINGS non_replicated_deduplication_window = 10240, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'What became of dead letters; the newest row of an origin counts.';
