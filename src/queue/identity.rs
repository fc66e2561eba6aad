//! Which store it is: told by an instance on its control port, so that a command beside it can find
//! out whether its own is the same. Without secrets.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde_json::{Value, json};
use uuid::Uuid;

/// A store, as far as two processes can compare it.
#[derive(Debug, Clone)]
pub struct Identity {
    /// For people; without the password.
    pub name: String,
    /// Of SQLite.
    pub file: Option<PathBuf>,
}

/// Whether another process has the same store.
#[derive(Debug, PartialEq, Eq)]
pub enum Likeness {
    Same,
    Other,
    /// Only the store can tell: the same if this instance is known there. One server has many names.
    IfKnows(Uuid),
}

impl Identity {
    /// For others; `instance` is the name by which the store knows this process, if it does.
    pub fn to_json(&self, instance: Option<Uuid>) -> Value {
        let instance = instance.map(|name| name.to_string());
        json!({ "name": self.name, "file": self.file_id(), "instance": instance })
    }

    /// Compares it with what another process has told, as [`Identity::to_json`] has it.
    pub fn compare(&self, told: &Value) -> Likeness {
        let is_same = |same: bool| match same {
            true => Likeness::Same,
            false => Likeness::Other,
        };
        let name = told["name"].as_str();
        let instance = told["instance"].as_str();
        let instance = instance.and_then(|id| Uuid::parse_str(id).ok());
        match (&self.file, told["file"].as_str(), instance) {
            // A file has several names, too, and another one in each container.
            (Some(_), Some(id), _) => is_same(self.file_id().as_deref() == Some(id)),
            (None, None, Some(instance)) if name != Some(&self.name) => Likeness::IfKnows(instance),
            _ => is_same(name == Some(&self.name)),
        }
    }

    /// Which file has this path by now, if any has.
    fn file_id(&self) -> Option<String> {
        let file = self.file.as_ref()?.metadata().ok()?;
        Some(format!("{}:{}", file.dev(), file.ino()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: PathBuf) -> Identity {
        Identity {
            name: format!("sqlite:{}", path.display()),
            file: Some(path),
        }
    }

    #[test]
    fn a_file_is_the_same_by_whatever_path_and_another_in_its_place_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("queue"), "").unwrap();
        std::fs::write(path("other"), "").unwrap();
        std::fs::hard_link(path("queue"), path("link")).unwrap();
        let told = file(path("queue")).to_json(None);
        let compared = |name: &str| file(path(name)).compare(&told);
        assert_eq!(compared("queue"), Likeness::Same);
        assert_eq!(compared("link"), Likeness::Same);
        assert_eq!(compared("other"), Likeness::Other);
        assert_eq!(compared("none"), Likeness::Other);
        // One that is not there yet is known by its path only.
        let told = file(path("none")).to_json(None);
        assert_eq!(file(path("none")).compare(&told), Likeness::Same);
        assert_eq!(file(path("queue")).compare(&told), Likeness::Other);
    }

    #[test]
    fn a_server_of_another_name_is_the_same_if_it_knows_the_instance() {
        let server = |name: &str| Identity {
            name: name.to_owned(),
            file: None,
        };
        let id = Uuid::from_u128(7);
        let told = server("host=a dbname=q").to_json(Some(id));
        let compared = |own: &Identity| own.compare(&told);
        assert_eq!(compared(&server("host=a dbname=q")), Likeness::Same);
        assert_eq!(compared(&server("host=b dbname=q")), Likeness::IfKnows(id));
        assert_eq!(compared(&file("queue".into())), Likeness::Other);
        assert_eq!(
            server("host=a dbname=q").compare(&file("queue".into()).to_json(None)),
            Likeness::Other
        );
    }
}
