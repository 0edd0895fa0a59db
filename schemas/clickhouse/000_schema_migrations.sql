-- What has been applied to this database. A file that was applied is never edited: a change is a new file.

CREATE TABLE IF NOT EXISTS schema_migrations
(
    version    UInt32                 COMMENT 'Number that the file name begins with.',
    name       String                 COMMENT 'The rest of the file name.',
    sha256     String                 COMMENT 'SHA-256 of the file as it was applied, hex.',
    applied_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'When.'
)
ENGINE = ReplacingMergeTree ORDER BY version
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1
COMMENT 'Migrations applied to this database.';
