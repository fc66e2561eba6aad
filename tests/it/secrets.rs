//! What comes from files is used, and shown nowhere.

use crate::support::proxy::Setup;

#[test]
fn check_config_shows_no_password_whatever_the_way_in() {
    const SECRET: &str = "postgres://ann:hush-hush@127.0.0.1:1/queue";
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("db.connection_string");
    for (content, status) in [(SECRET, 0), ("postgress://ann:hush-hush@h/q", 2)] {
        std::fs::write(&file, format!("{content}\n")).expect("write");
        for (name, value) in [
            ("DB_CONNECTION_STRING", content),
            ("DB_CONNECTION_STRING_FILE", file.to_str().expect("UTF-8")),
            (
                "CREDENTIALS_DIRECTORY",
                folder.path().to_str().expect("UTF-8"),
            ),
        ] {
            let setup = Setup::empty();
            let mut command = setup.command();
            command.env_remove("DB_CONNECTION_STRING").env(name, value);
            std::fs::write(folder.path().join("config.yaml"), "").expect("write");
            command
                .arg("--config")
                .arg(folder.path().join("config.yaml"));
            let output = command.arg("--check-config").output().expect("run");
            let shown =
                String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert_eq!(output.status.code(), Some(status), "{name}: {shown}");
            assert!(!shown.contains("hush"), "{name}: {shown}");
            assert_eq!(shown.contains("127.0.0.1"), status == 0, "{name}: {shown}");
        }
    }
}
