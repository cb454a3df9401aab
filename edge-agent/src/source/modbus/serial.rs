//! A serial line: a terminal device set to raw bytes, read and written without blocking.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use rustix::termios::{ControlModes, OptionalActions, tcgetattr, tcsetattr};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::config::Parity;

#[derive(Debug)]
pub(super) struct Line(AsyncFd<File>);

impl Line {
    /// Opens and sets it: eight bits, and what is given.
    pub(super) fn open(path: &Path, baud: u32, parity: Parity, stop_bits: u8) -> io::Result<Self> {
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        let mut settings = tcgetattr(&file)?;
        settings.make_raw();
        settings.set_speed(baud)?;
        // CLOCAL: the line is there without a modem's signals.
        settings.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
        let (check, odd) = (ControlModes::PARENB, ControlModes::PARODD);
        settings.control_modes.set(check, parity != Parity::None);
        settings.control_modes.set(odd, parity == Parity::Odd);
        settings.control_modes.set(ControlModes::CSTOPB, stop_bits == 2);
        // What came before is no answer to what will be asked.
        tcsetattr(&file, OptionalActions::Flush, &settings)?;
        #[allow(deprecated, reason = "a file keeps its descriptor as long as it lives; `register` is unsafe code")]
        let line = AsyncFd::new(file)?;
        Ok(Self(line))
    }
}

impl AsyncRead for Line {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let room = buffer.initialize_unfilled();
            if let Ok(count) = guard.try_io(|file| file.get_ref().read(room)) {
                buffer.advance(count?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Line {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(result) = guard.try_io(|file| file.get_ref().write(bytes)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
