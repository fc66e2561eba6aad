//! What must hold for any bytes a sender may send: shared by the fuzz target and by the tests
//! that replay its corpus.

use std::io;
use std::mem::MaybeUninit;

use asyncproxy::budget::Budget;
use asyncproxy::intake::Answer;
use asyncproxy::intake::builtin::body::{Fault, Input, Source};
use asyncproxy::intake::builtin::head::{FIELDS_BYTES_MAX, FIELDS_MAX, Head, LINE_BYTES_MAX};

pub const BODY_BYTES_MAX: usize = 64 * 1024;

/// A request as it was understood.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    pub target: String,
    pub fields: Vec<(String, Vec<u8>)>,
    pub body: Vec<u8>,
    pub keep_alive: bool,
}

/// Bytes that arrive in pieces of the given sizes, over and over.
pub struct Pieces<'a> {
    bytes: &'a [u8],
    sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
    pub continues: usize,
}

impl<'a> Pieces<'a> {
    pub fn new(bytes: &'a [u8], sizes: &'a [usize]) -> Pieces<'a> {
        Pieces {
            bytes,
            sizes: sizes.iter().cycle(),
            continues: 0,
        }
    }
}

impl Source for Pieces<'_> {
    fn read_first(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_more(buffer)
    }

    fn read_more(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        assert!(
            !buffer.is_empty(),
            "a read into nothing would look like the end"
        );
        let size = self.sizes.next().copied().unwrap_or(usize::MAX).max(1);
        let size = size.min(buffer.len()).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(size);
        buffer[..size].copy_from_slice(now);
        self.bytes = later;
        Ok(size)
    }

    fn send_continue(&mut self) -> io::Result<()> {
        self.continues += 1;
        Ok(())
    }
}

/// Nothing but what is here already.
struct Here;

impl Source for Here {
    fn read_first(&mut self, _: &mut [u8]) -> io::Result<usize> {
        unreachable!("nothing can be waited for")
    }

    fn read_more(&mut self, _: &mut [u8]) -> io::Result<usize> {
        unreachable!("nothing can be waited for")
    }

    fn send_continue(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn can_wait(&self) -> bool {
        false
    }
}

/// Reads as the front does, which receives once and hands over what is not whole or not valid.
pub fn read_in_front(bytes: &[u8], received: usize) -> (Vec<Seen>, Fault) {
    let mut input = Input::default();
    let room = input.anew();
    let received = received.min(room.len()).min(bytes.len());
    room[..received].copy_from_slice(&bytes[..received]);
    input.received(received);
    let mut seen = Vec::new();
    let mut mark = input.mark();
    while !input.is_empty() {
        mark = input.mark();
        match read_one(&mut input, &mut Here) {
            Ok(request) => seen.push(request),
            Err(_) => break,
        }
        mark = input.mark();
    }
    let mut input = Input::holding(input.since(mark).to_vec());
    let mut source = Pieces::new(&bytes[received..], &[usize::MAX]);
    loop {
        match read_one(&mut input, &mut source) {
            Ok(request) => seen.push(request),
            Err(fault) => return (seen, fault),
        }
    }
}

/// Reads all requests that `bytes` hold, and how it ended.
pub fn read_all(bytes: &[u8], sizes: &[usize]) -> (Vec<Seen>, Fault) {
    let mut source = Pieces::new(bytes, sizes);
    let mut input = Input::default();
    let mut seen = Vec::new();
    loop {
        match read_one(&mut input, &mut source) {
            Ok(request) => seen.push(request),
            Err(fault) => return (seen, fault),
        }
    }
}

fn read_one(input: &mut Input, source: &mut impl Source) -> Result<Seen, Fault> {
    let mut head = Vec::new();
    let head_bytes_max = LINE_BYTES_MAX + FIELDS_BYTES_MAX + 4;
    let mut permit = Budget::new(2 * head_bytes_max).permit();
    input.read_head(source, &mut head, &mut permit)?;
    assert_eq!(permit.bytes(), head.len());
    assert!(head.len() <= head_bytes_max);
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let head = Head::parse(&head, &mut fields)?;
    let mut permit = Budget::new(BODY_BYTES_MAX).permit();
    let body = input.read_body(source, head.framing, BODY_BYTES_MAX, &mut permit)?;
    assert!(body.len() <= BODY_BYTES_MAX);
    Ok(Seen {
        method: head.method.to_owned(),
        target: head.target.to_owned(),
        fields: head
            .fields
            .iter()
            .map(|field| (field.name.to_owned(), field.value.to_owned()))
            .collect(),
        body,
        keep_alive: head.keep_alive,
    })
}

/// The status a fault is answered with, if it is answered.
pub fn status(fault: &Fault) -> Option<u16> {
    match fault {
        Fault::Gone | Fault::Idle => None,
        Fault::Refused(answer) => Some(Answer::status(answer)),
    }
}

/// Checks one input: it is understood alike however it is cut, and what is understood is sound.
pub fn check(bytes: &[u8]) {
    let (whole, whole_end) = read_all(bytes, &[usize::MAX]);
    for sizes in [&[1][..], &[2, 3, 1], &[7, 1, 64], &[4096]] {
        let (pieces, pieces_end) = read_all(bytes, sizes);
        assert_eq!(whole, pieces, "cut into {sizes:?}");
        assert_eq!(
            status(&whole_end),
            status(&pieces_end),
            "cut into {sizes:?}"
        );
    }
    for received in [1, bytes.len() / 2, bytes.len()] {
        let (seen, end) = read_in_front(bytes, received);
        assert_eq!(whole, seen, "{received} bytes received at once");
        assert_eq!(status(&whole_end), status(&end), "{received} bytes");
    }
    for request in whole {
        assert!(!request.method.is_empty());
        let is_bad = |byte: u8| byte <= b' ' || byte == 0x7f;
        assert!(!request.target.bytes().any(is_bad));
        for (name, value) in &request.fields {
            assert!(!name.is_empty() && !name.bytes().any(|byte| is_bad(byte) || byte == b':'));
            let is_control = |byte: &u8| matches!(byte, 0..=8 | 10..=31 | 127);
            assert!(!value.iter().any(is_control));
        }
    }
}
