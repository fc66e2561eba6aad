-- Each step leaves alone what is there: after a restore that brought back a part, all are run again.

-- Requests that wait or are leased.
CREATE TABLE IF NOT EXISTS proxy_requests (
    id              uuid        PRIMARY KEY,
    received_at     timestamptz NOT NULL CHECK (isfinite(received_at)),
    next_attempt_at timestamptz NOT NULL CHECK (isfinite(next_attempt_at)),
    -- Counts the attempt under way while the row is leased.
    attempt         integer     NOT NULL CHECK (attempt >= 0),
    leased          boolean     NOT NULL DEFAULT false CHECK (attempt >= leased::integer),
    last_status     integer,
    last_error      text,
    method          text        NOT NULL,
    target          text        NOT NULL,
    -- `Name: value CR LF` each, as received.
    headers         bytea       NOT NULL,
    body            bytea       NOT NULL
) WITH (
    -- Every row is updated and deleted soon after it came, so what counts is the number of
    -- dead rows, not their share in the table.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    toast.autovacuum_vacuum_scale_factor = 0,
    toast.autovacuum_vacuum_threshold = 10000
);

-- Compressing a body that lives for a moment costs more than writing it: 8.9 KB of JSON are
-- appended twice as fast without. Out of line, it is not written again by a claim.
ALTER TABLE proxy_requests ALTER COLUMN body SET STORAGE EXTERNAL;

-- Serves the claim by its first column, and counts by all three without the rows themselves.
-- A claim changes the first, so no update is a HOT one, and a lower fillfactor would not help.
-- Each row is in one of two: those that were tried at most once are claimed apart from the others.
CREATE INDEX IF NOT EXISTS proxy_requests_fresh ON proxy_requests (next_attempt_at)
    INCLUDE (leased, received_at) WHERE attempt <= 1;
CREATE INDEX IF NOT EXISTS proxy_requests_retried ON proxy_requests (next_attempt_at)
    INCLUDE (leased, received_at) WHERE attempt > 1;

-- Requests that were given up. Kept as they were: one that cannot be sent may be here, too.
CREATE TABLE IF NOT EXISTS proxy_dead_letters (
    id          uuid        PRIMARY KEY,
    received_at timestamptz,
    died_at     timestamptz NOT NULL,
    attempt     integer,
    last_status integer,
    last_error  text        NOT NULL,
    method      text,
    target      text,
    headers     bytea,
    body        bytea
);

CREATE INDEX IF NOT EXISTS proxy_dead_letters_died_at ON proxy_dead_letters (died_at);

-- What is left of `queue.handle_per_second` where all instances share it: one row, which a claim
-- locks, refills by the time that has passed, and takes its tokens from.
CREATE TABLE IF NOT EXISTS proxy_rate (
    is_only     boolean          PRIMARY KEY DEFAULT true CHECK (is_only),
    tokens      double precision NOT NULL CHECK (tokens >= 0 AND tokens < 'infinity'),
    refilled_at timestamptz      NOT NULL CHECK (isfinite(refilled_at))
) WITH (
    -- Updated some ten times a second, the index never. A page counts as full when a tenth of it
    -- is: so old versions are dropped in passing, after a dozen updates, and the table keeps to
    -- that page. Vacuum is left with what a long transaction has held up.
    fillfactor = 10,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000
);

-- Full as soon as someone asks, whatever the rate.
INSERT INTO proxy_rate (tokens, refilled_at) VALUES (0, 'epoch') ON CONFLICT DO NOTHING;

-- Holds a row while nobody is to claim anything.
CREATE TABLE IF NOT EXISTS proxy_pause (
    is_only   boolean     PRIMARY KEY DEFAULT true CHECK (is_only),
    paused_at timestamptz NOT NULL DEFAULT now()
);
