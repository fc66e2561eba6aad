//! Buffers for connections: they have some only while bytes go through them. With hundreds of
//! workers that wait for answers, theirs would be most of the memory in use.

use std::sync::{Arc, Mutex, PoisonError};

use ureq::unversioned::transport::Buffers;

/// Buffers that are kept for reuse: more threads hardly ever have bytes in hand at once.
const KEPT_MAX: usize = 8;

/// Buffers of one size, for all connections.
#[derive(Debug)]
pub(super) struct Pool {
    input_bytes: usize,
    output_bytes: usize,
    kept: Mutex<Vec<Memory>>,
}

impl Pool {
    pub(super) fn new(input_bytes: usize, output_bytes: usize) -> Arc<Pool> {
        Arc::new(Pool {
            input_bytes,
            output_bytes,
            kept: Mutex::default(),
        })
    }

    fn take(&self) -> Memory {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        kept.unwrap_or_else(|| Memory {
            input: vec![0; self.input_bytes],
            filled: 0,
            consumed: 0,
            output: Vec::new(),
        })
    }

    fn put(&self, memory: Memory) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(memory);
        }
    }
}

#[derive(Debug)]
struct Memory {
    input: Vec<u8>,
    filled: usize,
    consumed: usize,
    output: Vec<u8>,
}

impl Memory {
    /// Room for more input, behind what is not consumed yet.
    fn room(&mut self) -> &mut [u8] {
        self.input.copy_within(self.consumed..self.filled, 0);
        self.filled -= self.consumed;
        self.consumed = 0;
        &mut self.input[self.filled..]
    }
}

/// A connection's part in the pool.
pub(super) struct Pooled {
    pool: Arc<Pool>,
    memory: Option<Memory>,
    /// Whether the last call of `input_consume` got on with what was there.
    has_consumed: bool,
}

impl Pooled {
    pub(super) fn new(pool: &Arc<Pool>) -> Pooled {
        Pooled {
            pool: Arc::clone(pool),
            memory: None,
            has_consumed: false,
        }
    }

    fn memory(&mut self) -> &mut Memory {
        self.memory.get_or_insert_with(|| self.pool.take())
    }

    /// With room for output. Requests are sent from where they are: only what ureq itself sends
    /// needs some.
    fn memory_and_output(&mut self) -> &mut Memory {
        let output_bytes = self.pool.output_bytes;
        let memory = self.memory();
        memory.output.resize(output_bytes, 0);
        memory
    }

    /// Lets another have the buffers, if no input is left in them.
    pub(super) fn give_back(&mut self) {
        let is_done = |memory: &mut Memory| memory.filled == memory.consumed;
        if let Some(mut memory) = self.memory.take_if(is_done) {
            (memory.filled, memory.consumed) = (0, 0);
            self.pool.put(memory);
        }
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.consumed = memory.filled;
            self.give_back();
        }
    }
}

impl Buffers for Pooled {
    fn output(&mut self) -> &mut [u8] {
        &mut self.memory_and_output().output
    }

    fn input(&self) -> &[u8] {
        let memory = self.memory.as_ref();
        memory.map_or(&[], |memory| &memory.input[memory.consumed..memory.filled])
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        self.memory().room()
    }

    fn input_appended(&mut self, amount: usize) {
        let memory = self.memory();
        memory.filled = (memory.filled + amount).min(memory.input.len());
    }

    fn input_consume(&mut self, amount: usize) {
        self.has_consumed = amount > 0;
        if let Some(memory) = &mut self.memory {
            memory.consumed = (memory.consumed + amount).min(memory.filled);
        }
        // The end of an answer is not told otherwise.
        self.give_back();
    }

    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        let memory = self.memory_and_output();
        memory.room();
        (&mut memory.input[memory.filled..], &mut memory.output)
    }

    fn can_use_input(&self) -> bool {
        self.has_consumed && !self.input().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_kept_until_it_is_consumed_and_then_the_buffers_are_free() {
        let pool = Pool::new(8, 4);
        let mut buffers = Pooled {
            pool: Arc::clone(&pool),
            memory: None,
            has_consumed: false,
        };
        let free = || pool.kept.lock().unwrap().len();
        assert_eq!(buffers.input(), b"");
        buffers.input_append_buf()[..6].copy_from_slice(b"answer");
        buffers.input_appended(6);
        buffers.give_back();
        assert_eq!((buffers.input(), free()), (b"answer".as_slice(), 0));
        assert!(!buffers.can_use_input());
        buffers.input_consume(2);
        assert!(buffers.can_use_input());
        assert_eq!(buffers.input_append_buf().len(), 4);
        assert_eq!(buffers.input(), b"swer");
        let (tmp, output) = buffers.tmp_and_output();
        assert_eq!((tmp.len(), output.len()), (4, 4));
        buffers.input_consume(4);
        assert_eq!((buffers.input(), free()), (b"".as_slice(), 1));
        buffers.input_append_buf();
        assert_eq!(free(), 0);
        drop(buffers);
        assert_eq!(free(), 1);
    }
}
