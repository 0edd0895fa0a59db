-- Replays: what judges a unit, why a replay is in its state, how a label came about, what a promotion rests on.

ALTER TABLE replay_units
    ADD COLUMN IF NOT EXISTS prompt_digest LowCardinality(String) COMMENT 'The prompt version to judge it with; empty for kind detect.' AFTER created_at;
ALTER TABLE replay_units COMMENT COLUMN unit_id 'Replay and what is judged or seen: <replay>:<batch id> or <replay>:<frame id>.';
ALTER TABLE replay_units COMMENT COLUMN kind 'judge or detect.';
ALTER TABLE replays
    ADD COLUMN IF NOT EXISTS detail String COMMENT 'Why it is in this state, in words.' AFTER updated_at;
ALTER TABLE labels
    ADD COLUMN IF NOT EXISTS selection LowCardinality(String) COMMENT 'How it came to be labelled: empty where somebody came upon it, else the stratum of a labelling session.' AFTER labelled_at,
    ADD COLUMN IF NOT EXISTS chance Float64 COMMENT 'Probability with which the session chose it, 0 to 1; 0: unknown.' AFTER selection;
ALTER TABLE prompts
    ADD COLUMN IF NOT EXISTS evidence String COMMENT 'For a pointer: the replay that it was moved on the strength of; empty where none was named.' AFTER created_at;
