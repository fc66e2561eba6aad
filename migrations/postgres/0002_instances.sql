-- Who has been heard of, and when: each instance tells it every second. One that has not for a while
-- is taken for dead, and what it had leased is due again.
CREATE TABLE IF NOT EXISTS proxy_instances (
    id        uuid        PRIMARY KEY,
    last_seen timestamptz NOT NULL
) WITH (
    -- As proxy_rate: updated often, the index never.
    fillfactor = 10,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000
);

-- The instance that leased the row. NULL: not leased, or by a version of the program that did not
-- tell, whose leases just end. No reference: that would be looked up with each claim.
ALTER TABLE proxy_requests ADD COLUMN IF NOT EXISTS leased_by uuid;

-- Finds what an instance has leased among any number of rows that wait.
CREATE INDEX IF NOT EXISTS proxy_requests_leased ON proxy_requests (leased_by) WHERE leased;
