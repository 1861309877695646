//! Files that are there whole or not at all.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A file that gets its name when it is complete. Until then it is `NAME.partial` beside it, which
/// is removed if it never is.
#[derive(Debug)]
pub struct PartialFile {
    file: File,
    path: PathBuf,
    partial: PathBuf,
    kept: bool,
}

impl PartialFile {
    /// Begins the file that is to be `path`.
    ///
    /// # Errors
    ///
    /// If it cannot be created there, or `path` is a folder. Whatever is at `path` stays until
    /// [`PartialFile::keep`].
    pub fn create(path: &Path) -> io::Result<PartialFile> {
        if path.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a folder"));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = File::create(&partial)?;
        Ok(PartialFile { file, path: path.to_path_buf(), partial, kept: false })
    }

    /// Where it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to write to.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// It is complete: gives it its name, in place of what had it before.
    ///
    /// # Errors
    ///
    /// If it cannot be renamed; it is removed then.
    pub fn keep(mut self) -> io::Result<()> {
        std::fs::rename(&self.partial, &self.path)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.kept {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn it_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let names = || -> Vec<_> {
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect()
        };
        let mut file = PartialFile::create(&path).unwrap();
        file.file().write_all(b"half").unwrap();
        drop(file);
        assert!(names().is_empty(), "{:?}", names());
        std::fs::write(&path, "before").unwrap();
        let mut file = PartialFile::create(&path).unwrap();
        file.file().write_all(b"whole").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
        file.keep().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(names(), ["out"]);
        assert!(PartialFile::create(folder.path()).is_err(), "a folder");
        assert!(PartialFile::create(&path.join("below a file")).is_err());
    }
}
