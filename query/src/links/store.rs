//! Where links are kept: those that came over HTTP as `<data_dir>/links/<name>.toml`, and those of the configuration.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::link::LinkSettings;
use super::{LINKS_MAX, loops};
use crate::alerts::store::{files, make, read, remove, replace};

/// A link with where it is from.
#[derive(Debug, Clone)]
pub(super) struct Loaded {
    pub(super) settings: LinkSettings,
    pub(super) configured: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct LinkStore {
    directory: PathBuf,
    links: BTreeMap<String, Loaded>,
}

impl LinkStore {
    /// Reads all links.
    ///
    /// # Errors
    /// When a file cannot be read or is wrong, which it names, or links feed themselves.
    pub(super) fn open(directory: &Path, configured: Option<&Path>) -> Result<(Self, Vec<Loaded>), String> {
        let mut links = BTreeMap::new();
        for path in configured.map(files).transpose()?.unwrap_or_default() {
            let read = LinkSettings::parse_file(&read(&path)?);
            for settings in read.map_err(|error| format!("{}: {error}", path.display()))? {
                let name = settings.name.clone();
                if links.insert(name.clone(), Loaded { settings, configured: true }).is_some() {
                    return Err(format!("{}: there is another link `{name}`", path.display()));
                }
            }
        }
        make(directory)?;
        for path in files(directory)? {
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
            let settings = LinkSettings::parse(&name, &read(&path)?);
            let settings = settings.map_err(|error| format!("{}: {error}", path.display()))?;
            if links.insert(name.clone(), Loaded { settings, configured: false }).is_some() {
                return Err(format!("{}: there is a link `{name}` in the configuration, too", path.display()));
            }
        }
        if links.len() > LINKS_MAX {
            return Err(format!("{} links are more than {LINKS_MAX}", links.len()));
        }
        let loaded: Vec<Loaded> = links.values().cloned().collect();
        check_loops(loaded.iter().map(|loaded| &loaded.settings))?;
        Ok((Self { directory: directory.to_owned(), links }, loaded))
    }

    /// Whether a link may come in beside the others.
    pub(super) fn admits(&self, settings: &LinkSettings) -> Result<(), String> {
        if self.links.get(&settings.name).is_some_and(|known| known.configured) {
            return Err(format!("link `{}` is in a file of the configuration: change it there", settings.name));
        }
        if self.links.len() >= LINKS_MAX && !self.links.contains_key(&settings.name) {
            return Err(format!("there are {LINKS_MAX} links: delete some"));
        }
        let others = self.links.values().map(|loaded| &loaded.settings).filter(|other| other.name != settings.name);
        check_loops(others.chain([settings]))
    }

    pub(super) fn put(&mut self, settings: LinkSettings, text: &str) -> Result<(), String> {
        replace(&self.directory, &settings.name, text)?;
        self.links.insert(settings.name.clone(), Loaded { settings, configured: false });
        Ok(())
    }

    pub(super) fn delete(&mut self, name: &str) -> Result<(), String> {
        match self.links.get(name) {
            None => return Err(format!("there is no link `{name:.80}`")),
            Some(known) if known.configured => {
                return Err(format!("link `{name}` is in a file of the configuration: remove it there"));
            }
            Some(_) => {}
        }
        remove(&self.directory, name)?;
        self.links.remove(name);
        Ok(())
    }

    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.links.get(name).filter(|known| !known.configured)?;
        read(&self.directory.join(format!("{name}.toml"))).ok()
    }
}

/// Refuses links that feed themselves, and names them.
fn check_loops<'s>(links: impl Iterator<Item = &'s LinkSettings>) -> Result<(), String> {
    let mut all = BTreeMap::new();
    for link in links {
        all.insert(link.name.clone(), link.ends()?);
    }
    match loops::find(&all) {
        Some(path) => Err(format!(
            "links feed each other in a loop: {}; each tells on a topic that the next listens to",
            path.join(" → ")
        )),
        None => Ok(()),
    }
}
