//! Values that come from files: those that `NAME_FILE` names, and systemd's credentials. Reads
//! them, never shows what they hold.

use std::io;
use std::path::Path;

use crate::regular_file;

/// More than any setting needs.
const VALUE_BYTES_MAX: usize = 64 * 1024;

/// What a file holds, less one line end. None if there is no such file.
///
/// # Errors
/// What is wrong with the file, its path first, without its content.
pub(super) fn read(path: &Path) -> Result<Option<String>, String> {
    let wrong = |what: &str| format!("{path:?}: {what}");
    let bytes = match regular_file::read(path, VALUE_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(wrong(&format!("cannot read it: {error}"))),
    };
    let text = String::from_utf8(bytes).map_err(|_| wrong("must be UTF-8"))?;
    if text.contains('\0') {
        return Err(wrong("must not hold NUL"));
    }
    let value = text.strip_suffix('\n').unwrap_or(&text);
    let value = match value.len() < text.len() {
        true => value.strip_suffix('\r').unwrap_or(value),
        false => value,
    };
    Ok(Some(value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_end_is_cut_and_bad_files_are_not_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("value");
        for (bytes, value) in [
            ("a", "a"),
            ("a\n", "a"),
            ("a\r\n", "a"),
            ("a\n\n", "a\n"),
            ("a\r", "a\r"),
            ("", ""),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path), Ok(Some(value.to_owned())), "{bytes:?}");
        }
        for (bytes, part) in [
            (b"hush\xff".to_vec(), "UTF-8"),
            (b"hush\0".to_vec(), "NUL"),
            (b"hush".repeat(20_000), "more than 65536 bytes"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = read(&path).unwrap_err();
            assert!(error.contains(part) && !error.contains("hush"), "{error}");
        }
        assert_eq!(read(&folder.path().join("none")), Ok(None));
        assert!(read(folder.path()).unwrap_err().contains("directory"));
    }
}
