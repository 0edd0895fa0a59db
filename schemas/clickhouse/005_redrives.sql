-- Which redriven record a status is due to, and what `open` says.

ALTER TABLE dead_letter_status ADD COLUMN IF NOT EXISTS
    record Nullable(String) COMMENT 'The redriven record that was resolved or failed again, topic:epoch:partition:offset.'
    AFTER at;
ALTER TABLE dead_letter_status COMMENT COLUMN
    status 'redriven (its bytes are on their way again), open (they failed again), resolved or discarded.';
ALTER TABLE dead_letter_status MODIFY COMMENT
    'What became of dead letters. Once a letter''s stage has said resolved it stays so; else the newest row of an origin counts.';
