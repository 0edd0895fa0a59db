-- What NVML tells besides, and NULL for what a card does not tell: 0 would be a reading.

ALTER TABLE gpu_metrics MODIFY COLUMN utilization Nullable(Float64) COMMENT 'Share of time that kernels ran, 0 to 1; NULL: not told.';
ALTER TABLE gpu_metrics MODIFY COLUMN memory_used Nullable(Int64) COMMENT 'Bytes, the driver''s own included; NULL: not told.';
ALTER TABLE gpu_metrics MODIFY COLUMN memory_total Nullable(Int64) COMMENT 'Bytes; NULL: not told.';
ALTER TABLE gpu_metrics MODIFY COLUMN temperature Nullable(Float64) COMMENT 'Degrees Celsius; NULL: not told.';
ALTER TABLE gpu_metrics MODIFY COLUMN power Nullable(Float64) COMMENT 'Watts; NULL: not told.';
ALTER TABLE gpu_metrics
    ADD COLUMN IF NOT EXISTS uuid Nullable(String) COMMENT 'What NVML calls the card wherever it is plugged in.' AFTER read_at,
    ADD COLUMN IF NOT EXISTS driver Nullable(String) COMMENT 'The driver''s version.' AFTER uuid,
    ADD COLUMN IF NOT EXISTS cuda Nullable(String) COMMENT 'The newest CUDA that the driver serves.' AFTER driver,
    ADD COLUMN IF NOT EXISTS memory_utilization Nullable(Float64) COMMENT 'Share of time that memory was read or written, 0 to 1.' AFTER cuda,
    ADD COLUMN IF NOT EXISTS power_limit Nullable(Float64) COMMENT 'The limit in force, watts.' AFTER memory_utilization,
    ADD COLUMN IF NOT EXISTS clock_sm Nullable(Int32) COMMENT 'Clock of the streaming multiprocessors, MHz.' AFTER power_limit,
    ADD COLUMN IF NOT EXISTS clock_memory Nullable(Int32) COMMENT 'Clock of the memory, MHz.' AFTER clock_sm,
    ADD COLUMN IF NOT EXISTS ecc_volatile Nullable(Int64) COMMENT 'Uncorrected memory errors since the driver was loaded; NULL: a card without ECC.' AFTER clock_memory,
    ADD COLUMN IF NOT EXISTS ecc_aggregate Nullable(Int64) COMMENT 'Uncorrected memory errors in the card''s life.' AFTER ecc_volatile,
    ADD COLUMN IF NOT EXISTS throttled Nullable(Bool) COMMENT 'Whether its clocks are held down; NULL: not told.' AFTER ecc_aggregate,
    ADD COLUMN IF NOT EXISTS throttle_reasons Array(LowCardinality(String)) COMMENT 'Why they are, in words.' AFTER throttled,
    ADD COLUMN IF NOT EXISTS process_count Nullable(Int32) COMMENT 'Processes with memory on the card; NULL: not told.' AFTER throttle_reasons,
    ADD COLUMN IF NOT EXISTS `processes.pid` Array(Int32) COMMENT 'Their process ids.' AFTER process_count,
    ADD COLUMN IF NOT EXISTS `processes.name` Array(Nullable(String)) COMMENT 'Their programs, without arguments.' AFTER `processes.pid`,
    ADD COLUMN IF NOT EXISTS `processes.memory` Array(Nullable(Int64)) COMMENT 'Bytes of each; NULL: not told.' AFTER `processes.name`,
    ADD COLUMN IF NOT EXISTS error Nullable(String) COMMENT 'Why nothing could be read: the card has fallen off the bus.' AFTER `processes.memory`;
