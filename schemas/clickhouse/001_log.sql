-- The log as it was read, byte for byte, and how far each partition has come.
--
-- non_replicated_deduplication_window: tokens that a table remembers. At most one range per (topic, partition) is in
-- flight: 15 topics x 64 partitions = 960 in production, and 20,000 is 20 times that. A token that was forgotten
-- costs nothing that is seen: the sorting key is the record's position, so FINAL folds the repeated rows.
-- Above 128 partitions raise it: ALTER TABLE log MODIFY SETTING non_replicated_deduplication_window = ...
--
-- fsync_after_insert, fsync_part_directory: an insert is answered when it is on disk. Measured on one ext4 disk: 13 ms
-- an insert against 9 ms without. Without them a power cut can cost the last seconds of rows that the sink believes
-- stored, and the tables have to be rebuilt from the log.

CREATE TABLE IF NOT EXISTS log
(
    topic        LowCardinality(String) COMMENT 'The topic.',
    epoch        LowCardinality(String) COMMENT 'Which life of the topic: new with each creation.',
    `partition`  Int32                  COMMENT 'The partition.',
    `offset`     Int64                  COMMENT 'The offset. Offsets have holes: count rows, never spans.',
    `key`        Nullable(String)       COMMENT 'The key, as it came.',
    value        Nullable(String) CODEC(ZSTD(1)) COMMENT 'The original bytes: Confluent framing and Avro.',
    headers      Array(Tuple(name String, value String)) COMMENT 'The headers, in order; values may be binary.',
    fingerprint  LowCardinality(String) COMMENT 'Rabin fingerprint of the schema it was written with, hex; empty where it named none.',
    source       String                 COMMENT 'The record that it was made from: topic:epoch:partition:offset; empty where it names none.',
    tick         Bool                   COMMENT 'Whether it is a tick (wall time as an event), not data.',
    decode_error String                 COMMENT 'Why it has no typed row; empty where it has one, and for ticks.',
    inserted_at  DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When ClickHouse took it.'
)
ENGINE = ReplacingMergeTree ORDER BY (topic, epoch, `partition`, `offset`)
SETTINGS non_replicated_deduplication_window = 20000, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'Every record of every topic kept here, byte for byte: what replay reads.';

CREATE TABLE IF NOT EXISTS sink_progress
(
    topic       LowCardinality(String) COMMENT 'The topic.',
    epoch       LowCardinality(String) COMMENT 'Which life of the topic.',
    `partition` Int32                  COMMENT 'The partition.',
    lo          Int64                  COMMENT 'First offset of the range.',
    hi          Int64                  COMMENT 'Last offset of the range, inclusive.',
    rows        Int32                  COMMENT 'Records in the range: offsets have holes.',
    ticks       Int32                  COMMENT 'Ticks among them.',
    undecodable Int32                  COMMENT 'Records among them that have no typed row; see log.decode_error.',
    inserted_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When the range was complete.'
)
ENGINE = ReplacingMergeTree ORDER BY (topic, epoch, `partition`, hi)
SETTINGS non_replicated_deduplication_window = 20000, fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'One row for each range that is complete in log and typed table.';
