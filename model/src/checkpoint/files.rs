//! Where a checkpoint's files come from: a folder, or memory.

use std::{
    borrow::Cow,
    fs, io,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use super::{error::CheckpointError, map::map_file};

/// A checkpoint's files by name.
#[derive(Debug)]
pub(super) enum Files {
    Folder(PathBuf),
    Memory(&'static [(&'static str, &'static [u8])]),
}

/// The contents of a weight file.
#[derive(Debug)]
pub(super) enum Contents {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl Contents {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Contents::Mapped(map) => map,
            Contents::Static(bytes) => bytes,
        }
    }
}

impl Files {
    pub(super) fn folder(path: &Path) -> Result<Files, CheckpointError> {
        let path = path.to_owned();
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Ok(Files::Folder(path)),
            Ok(_) => Err(CheckpointError::NotAFolder { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(CheckpointError::NotFound { path })
            }
            Err(source) => Err(CheckpointError::Io { path, source }),
        }
    }

    /// How messages call the place.
    pub(super) fn location(&self) -> String {
        match self {
            Files::Folder(path) => path.display().to_string(),
            Files::Memory(_) => "the built-in checkpoint".to_owned(),
        }
    }

    /// Reads a small file; `None` if there is none of this name.
    pub(super) fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        match self {
            Files::Folder(folder) => {
                found(fs::read(folder.join(name)), &folder.join(name)).map(|b| b.map(Cow::Owned))
            }
            Files::Memory(_) => Ok(self.embedded(name).map(Cow::Borrowed)),
        }
    }

    /// Opens a weight file without reading it; `None` if there is none of this name.
    pub(super) fn open(&self, name: &str) -> Result<Option<Contents>, CheckpointError> {
        match self {
            Files::Folder(folder) => {
                let contents = map_file(&folder.join(name))
                    .map(|map| map.map_or(Contents::Static(&[]), Contents::Mapped));
                found(contents, &folder.join(name))
            }
            Files::Memory(_) => Ok(self.embedded(name).map(Contents::Static)),
        }
    }

    fn embedded(&self, name: &str) -> Option<&'static [u8]> {
        let Files::Memory(files) = self else { return None };
        files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| *bytes)
    }
}

/// Tells "no such file" from every other failure.
fn found<T>(result: io::Result<T>, path: &Path) -> Result<Option<T>, CheckpointError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CheckpointError::Io { path: path.to_owned(), source }),
    }
}
