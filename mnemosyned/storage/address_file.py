"""The file of a server's address, which is followed: a new address takes effect without a restart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from mnemosyned.config.flags import ConfigError, flags_of
from mnemosyned.security.file_reloader import FileReloader, FilesUnusable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.address_flags import is_private

if TYPE_CHECKING:
    from mnemosyned.storage.address_flags import AddressSection


def reloader_of(section: AddressSection) -> FileReloader[str] | None:
    """Return what reads the file again; None: there is no file, or a private server. Raises FilesUnusable."""
    if not section.address_file or is_private(section.address):
        return None

    def read() -> str:
        try:
            found = section.address_in_file()
        except ConfigError as exc:
            raise FilesUnusable(str(exc)) from None
        if is_private(found):
            raise FilesUnusable(f"{section.address_file}: a private server needs a restart")
        return found

    name = flags_of(type(section))["address"].name.replace(".", "_")
    return FileReloader(name, [section.address_file], read, secret_paths=[section.address_file])


def follow(address: FileReloader[str], use: Callable[[str], Awaitable[None]]) -> None:
    """Have a pool use each new address by a method that raises StorageRefused if it cannot."""

    async def take(text: str) -> None:
        try:
            await use(text)
        except StorageRefused as exc:
            raise FilesUnusable(str(exc)) from exc

    address.followers.append(take)
