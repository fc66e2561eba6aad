-- Requests that wait or are leased.
CREATE TABLE proxy_requests (
    seq             INTEGER PRIMARY KEY,
    -- UUID, 16 bytes.
    id              BLOB    NOT NULL UNIQUE CHECK (length(id) = 16),
    -- Milliseconds since 1970, as all times here.
    received_at     INTEGER NOT NULL,
    next_attempt_at INTEGER NOT NULL,
    -- Counts the attempt under way while the row is leased.
    attempt         INTEGER NOT NULL CHECK (attempt >= 0),
    leased          INTEGER NOT NULL DEFAULT 0 CHECK (leased IN (0, 1) AND attempt >= leased),
    last_status     INTEGER,
    last_error      TEXT,
    method          TEXT    NOT NULL,
    target          TEXT    NOT NULL,
    -- `Name: value CR LF` each, as received.
    headers         BLOB    NOT NULL,
    -- Last, so that reading the others does not walk through its pages.
    body            BLOB    NOT NULL
) STRICT;

-- Serves the claim by its first column, and counts by all three without the rows themselves.
-- Each row is in one of two: those that were tried at most once are claimed apart from the others.
CREATE INDEX proxy_requests_fresh ON proxy_requests (next_attempt_at, leased, received_at)
    WHERE attempt <= 1;
CREATE INDEX proxy_requests_retried ON proxy_requests (next_attempt_at, leased, received_at)
    WHERE attempt > 1;

-- Requests that were given up. Kept as they were: a row that cannot be read may be here, too.
CREATE TABLE proxy_dead_letters (
    seq         INTEGER PRIMARY KEY,
    id          BLOB    UNIQUE,
    received_at INTEGER,
    died_at     INTEGER NOT NULL,
    attempt     INTEGER,
    last_status INTEGER,
    last_error  TEXT    NOT NULL,
    method      TEXT,
    target      TEXT,
    headers     BLOB,
    body        BLOB
) STRICT;

CREATE INDEX proxy_dead_letters_died_at ON proxy_dead_letters (died_at);

-- Holds a row while nobody is to claim anything.
CREATE TABLE proxy_pause (
    is_only   INTEGER PRIMARY KEY CHECK (is_only = 1),
    paused_at INTEGER NOT NULL
) STRICT;
