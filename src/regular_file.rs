//! Files that are read whole, such as settings, keys and certificates.
//!
//! Only regular ones, and of a bounded size: opening a FIFO waits for whoever writes to it, and a
//! device may have no end. So whatever a path names, reading it does not hang the program.
//! `/dev/null` counts as an empty file, as which it is often given.

use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, major, minor};

/// Major and minor number of `/dev/null` on Linux.
const NULL_DEVICE: (u32, u32) = (1, 3);

/// What a file holds, of at most `bytes_max`. Symbolic links are followed.
///
/// # Errors
/// The system's, [`io::ErrorKind::NotFound`] among them; that it is no regular file, and what it is
/// instead; that it is too large.
pub fn read(path: &Path, bytes_max: usize) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let mut bytes = Vec::new();
    file.take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > bytes_max {
        let why = format!("holds more than {bytes_max} bytes, the most it may");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

/// Opens a regular file for reading.
///
/// # Errors
/// As [`read`].
pub fn open(path: &Path) -> io::Result<File> {
    // Before it is opened: that alone can set a device going.
    must_be_regular(&fs::metadata(path)?)?;
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    // It may have been replaced in between.
    must_be_regular(&file.metadata()?)?;
    Ok(file)
}

fn must_be_regular(metadata: &Metadata) -> io::Result<()> {
    let is_null = metadata.file_type().is_char_device()
        && (major(metadata.rdev()), minor(metadata.rdev())) == NULL_DEVICE;
    if metadata.is_file() || is_null {
        return Ok(());
    }
    let kind = kind_of(metadata.file_type());
    let why = format!("is {kind}, not a regular file");
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

/// What a file is, with its article.
pub fn kind_of(file_type: FileType) -> &'static str {
    match file_type {
        kind if kind.is_file() => "a regular file",
        kind if kind.is_dir() => "a directory",
        kind if kind.is_symlink() => "a symbolic link",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_block_device() => "a block device",
        kind if kind.is_char_device() => "a character device",
        _ => "of an unknown kind",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_path_names_reading_it_comes_to_an_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("file"), "12345").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        let made = std::process::Command::new("mkfifo")
            .arg(path("fifo"))
            .status();
        assert!(made.unwrap().success());
        std::os::unix::fs::symlink(path("fifo"), path("to-fifo")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for name in ["file", "link"] {
            assert_eq!(read(&path(name), 5).unwrap(), b"12345");
            let error = read(&path(name), 4).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        }
        assert_eq!(read(Path::new("/dev/null"), 5).unwrap(), b"");
        for (name, kind) in [
            ("fifo", "is a FIFO"),
            ("to-fifo", "is a FIFO"),
            ("socket", "is a socket"),
            (".", "is a directory"),
            ("/dev/zero", "is a character device"),
        ] {
            let error = read(&path(name), 5).unwrap_err().to_string();
            assert!(error.starts_with(kind), "{name}: {error}");
        }
        assert_eq!(
            read(&path("none"), 5).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
