//! Tells the commit of the build as `WEIR_COMMIT`, "unknown" outside a git repository of its own.
//!
//! Read from git's files, so that no git is needed, and again only when one of them says that HEAD has moved.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
    let commit = commit(&root).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=WEIR_COMMIT={commit}");
}

fn commit(root: &Path) -> Option<String> {
    let own = git_directory(&root.join(".git"))?;
    // A worktree has its own HEAD, and shares the branches.
    let shared = read_to_string(own.join("commondir")).map_or_else(|_| own.clone(), |path| own.join(path.trim()));
    let head = own.join("HEAD");
    watch(&head);
    let text = read_to_string(&head).ok()?;
    let Some(branch) = text.trim().strip_prefix("ref: ") else {
        return is_commit(text.trim());
    };
    let loose = shared.join(branch);
    if let Ok(text) = read_to_string(&loose) {
        watch(&loose);
        return is_commit(text.trim());
    }
    // A commit makes the branch's file, which cannot be watched before it is there: HEAD's log shows it.
    let packed = shared.join("packed-refs");
    [&packed, &own.join("logs/HEAD")].into_iter().filter(|path| path.exists()).for_each(|path| watch(path));
    let text = read_to_string(&packed).ok()?;
    text.lines()
        .find_map(|line| line.split_once(' ').filter(|(_, name)| *name == branch))
        .and_then(|(id, _)| is_commit(id))
}

/// `.git` itself, or where it points to as a file.
fn git_directory(git: &Path) -> Option<PathBuf> {
    if git.is_dir() {
        return Some(git.to_owned());
    }
    let text = read_to_string(git).ok()?;
    Some(git.parent()?.join(text.trim().strip_prefix("gitdir: ")?))
}

fn is_commit(id: &str) -> Option<String> {
    (id.len() >= 40 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| id[..12].to_owned())
}

fn watch(path: &Path) {
    println!("cargo::rerun-if-changed={}", path.display());
}
