//! Where what Criterion says goes: into a file, so that the tables stand alone on standard output.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::dup;
use rustix::stdio::{dup2_stdout, stdout};

/// Whether everything is only tried once, as Criterion decides it: with `cargo test --benches`
/// and `cargo bench -- --test`.
pub fn is_test() -> bool {
    has("--test") || !has("--bench")
}

fn has(wanted: &str) -> bool {
    let is_it = |argument: &String| argument.split('=').next() == Some(wanted);
    env::args().any(|argument| is_it(&argument))
}

/// Criterion's directory, by its own rule.
pub fn directory() -> PathBuf {
    env::var_os("CRITERION_HOME").map_or_else(
        || Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("criterion"),
        PathBuf::from,
    )
}

/// Takes what is written to standard output, until it is put back. What Criterion is just doing
/// it says on standard error, where it stays.
#[derive(Debug)]
pub struct Aside {
    stdout: OwnedFd,
    file: PathBuf,
}

impl Aside {
    /// Of a run that measures, and whose output no program waits for; else `None`. To be called
    /// when Criterion has read the arguments, as it answers some of them.
    pub fn take(bench: &str) -> Option<Aside> {
        if is_test() || has("--list") || has("--output-format") {
            return None;
        }
        let file = directory().join(bench).with_extension("txt");
        let taken = fs::create_dir_all(directory())
            .and_then(|()| File::create(&file))
            .and_then(|to| {
                let stdout = dup(stdout())?;
                dup2_stdout(&to)?;
                Ok(stdout)
            });
        let stdout = taken.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        Some(Aside { stdout, file })
    }

    /// Puts standard output back, and returns where the file is.
    pub fn put_back(self) -> PathBuf {
        io::stdout().flush().expect("flush");
        dup2_stdout(&self.stdout).expect("standard output");
        self.file
    }
}

/// Says where there is more to look at, after the tables.
pub fn print_where(plots: &[PathBuf], said: &Path) {
    println!();
    for plot in plots {
        println!("Plotted in {}", plot.display());
    }
    println!("What Criterion says is in {}", said.display());
    let index = directory().join("report/index.html");
    println!(
        "and its plots, with what has changed since the last run, in {}",
        index.display()
    );
}
