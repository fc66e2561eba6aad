//! The Debian package: installed, upgraded, removed and purged, in a root of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A root that knows dpkg and nothing else.
struct Root(TempDir);

impl Root {
    fn new() -> Root {
        let directory = TempDir::new().unwrap();
        let database = directory.path().join("var/lib/dpkg");
        for name in ["info", "updates", "triggers"] {
            fs::create_dir_all(database.join(name)).unwrap();
        }
        for name in ["status", "available"] {
            fs::write(database.join(name), "").unwrap();
        }
        Root(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs dpkg on it, scripts of the package included, and returns what it said.
    fn dpkg(&self, arguments: &[&str]) -> String {
        assert!(
            rustix::process::geteuid().is_root(),
            "only root can unpack a package"
        );
        let output = Command::new("dpkg")
            .arg(format!("--root={}", self.0.path().display()))
            .arg(format!("--log={}", self.path("dpkg.log").display()))
            .arg("--force-script-chrootless")
            .args(arguments)
            .output()
            .expect("dpkg");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).unwrap();
        assert!(output.status.success(), "{arguments:?}: {text}");
        text
    }
}

/// Packs the program that is tested, and returns the .deb.
fn build(output: &Path, version: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = Command::new(root.join("dist/build.sh"))
        .args([
            "--binary",
            env!("CARGO_BIN_EXE_asyncproxy"),
            "--version",
            version,
        ])
        .arg("--output")
        .arg(output)
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{text}");
    let mut packages = fs::read_dir(output)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let is_it = |path: &PathBuf| {
        path.to_string_lossy()
            .contains(&format!("asyncproxy_{version}_"))
    };
    packages.find(is_it).expect("a .deb")
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn the_package_comes_and_goes_and_leaves_settings_and_queue() {
    let output = TempDir::new().unwrap();
    let first = build(output.path(), "0.0.1");
    let second = build(output.path(), "0.0.2");
    let root = Root::new();
    let told = root.dpkg(&["--install", first.to_str().unwrap()]);
    assert!(told.contains("systemctl enable --now asyncproxy"), "{told}");
    for (name, expected) in [
        ("usr/bin/asyncproxy", 0o755),
        ("etc/asyncproxy/config.yaml", 0o644),
        ("lib/systemd/system/asyncproxy.service", 0o644),
        ("lib/systemd/system/asyncproxy.socket", 0o644),
        ("lib/systemd/system/asyncproxy-metrics.socket", 0o644),
        ("usr/share/doc/asyncproxy/copyright", 0o644),
        ("usr/share/doc/asyncproxy/alerts.yaml", 0o644),
    ] {
        assert_eq!(mode(&root.path(name)), expected, "{name}");
    }
    let config = root.path("etc/asyncproxy/config.yaml");
    let checked = Command::new(root.path("usr/bin/asyncproxy"))
        .args(["--check-config", "--config"])
        .arg(&config)
        .env_clear()
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");

    // An upgrade keeps what was changed, and says nothing of how to start.
    let changed = fs::read_to_string(&config).unwrap() + "\n# ours\n";
    fs::write(&config, &changed).unwrap();
    let queue = root.path("var/lib/private/asyncproxy");
    fs::create_dir_all(&queue).unwrap();
    let told = root.dpkg(&["--install", second.to_str().unwrap()]);
    assert!(!told.contains("enable --now"), "{told}");
    assert_eq!(fs::read_to_string(&config).unwrap(), changed);

    root.dpkg(&["--remove", "asyncproxy"]);
    assert!(!root.path("usr/bin/asyncproxy").exists());
    assert!(!root.path("lib/systemd/system/asyncproxy.service").exists());
    assert_eq!(fs::read_to_string(&config).unwrap(), changed);
    let told = root.dpkg(&["--purge", "asyncproxy"]);
    assert!(!root.path("etc/asyncproxy").exists());
    assert!(queue.exists());
    assert!(told.contains("is left: remove it by hand"), "{told}");
}

#[test]
fn what_the_operator_has_installed_by_hand_is_left_and_named() {
    let output = TempDir::new().unwrap();
    let package = build(output.path(), "0.0.1");
    let root = Root::new();
    let units = root.path("etc/systemd/system");
    let own = [
        units.join("asyncproxy.service"),
        units.join("asyncproxy.socket"),
        root.path("usr/local/bin/asyncproxy"),
    ];
    let drop_in = units.join("asyncproxy.service.d/sockets.conf");
    let other = units.join("asyncproxy.service.d/other.conf");
    let write = |path: &Path, text: &str| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    for path in &own {
        write(path, "by hand");
    }
    write(
        &drop_in,
        "[Service]\nEnvironment=SERVER_BIND=systemd:http\n",
    );
    let harmless =
        "#Environment=SERVER_BIND=systemd:http\nEnvironment=SERVER_BIND=systemd:http,:80\n";
    write(&other, harmless);
    // Of dpkg's root, as it is seen from outside.
    let name = |path: &Path| path.display().to_string();
    let told = root.dpkg(&["--install", package.to_str().unwrap()]);
    for path in &own {
        assert!(told.contains(&name(path)), "{told}");
    }
    assert!(
        !told.contains("asyncproxy-metrics.socket is used"),
        "{told}"
    );
    assert!(
        told.contains(&format!("{} asks for sockets", name(&drop_in))),
        "{told}"
    );
    assert!(!told.contains("other.conf"), "{told}");

    for step in ["--remove", "--purge"] {
        let told = root.dpkg(&[step, "asyncproxy"]);
        for path in [&drop_in, &other] {
            assert!(told.contains(&format!("{} is left", name(path))), "{told}");
        }
    }
    for path in own.iter().chain([&drop_in, &other]) {
        assert!(path.exists(), "{path:?}");
    }
    // Nothing of it, nothing said.
    let told = Root::new().dpkg(&["--install", package.to_str().unwrap()]);
    assert!(
        !told.contains("/etc/systemd") && !told.contains("hides"),
        "{told}"
    );
}

#[test]
fn the_same_source_makes_the_same_package() {
    let (one, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (one, other) = (build(one.path(), "0.0.1"), build(other.path(), "0.0.1"));
    assert!(fs::read(one).unwrap() == fs::read(other).unwrap());
}
