//! What must hold for any bytes a destination may answer: shared by the fuzz target and the tests.

use asyncproxy::upstream::answer::{Answer, Fault, LINE_BYTES_MAX, Reader};

/// What is made of some bytes: the answer, if there is one, and whether the connection is kept.
type Seen = (Result<Option<Answer>, Fault>, bool);

/// Reads as a connection does: what is not used comes again with what follows it.
fn read(bytes: &[u8], sizes: &[usize], is_to_head: bool) -> Seen {
    let mut reader = Reader::new(is_to_head);
    let mut held = Vec::new();
    let mut rest = bytes;
    for size in sizes.iter().cycle() {
        let (now, later) = rest.split_at((*size).clamp(1, 16 * 1024).min(rest.len()));
        rest = later;
        held.extend_from_slice(now);
        match reader.read(&held) {
            Ok(used) => drop(held.drain(..used)),
            Err(fault) => return (Err(fault), false),
        }
        if reader.is_over() || rest.is_empty() {
            break;
        }
        assert!(held.len() < LINE_BYTES_MAX, "{} bytes held", held.len());
    }
    reader.end();
    assert!(reader.is_over());
    (Ok(reader.answer().cloned()), reader.keeps_alive())
}

/// Checks one input: it is understood alike however it is cut, and what is understood is sound.
pub fn check(bytes: &[u8]) {
    for is_to_head in [false, true] {
        let whole = read(bytes, &[usize::MAX], is_to_head);
        for sizes in [&[1][..], &[2, 3, 1], &[7, 1, 64], &[4096]] {
            assert_eq!(whole, read(bytes, sizes, is_to_head), "cut into {sizes:?}");
        }
        if let (Ok(Some(answer)), _) = whole {
            assert!((100..=999).contains(&answer.status));
            assert!(answer.status == 101 || answer.status >= 200);
        }
    }
}
