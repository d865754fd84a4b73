"""Where OneLake differs: workspaces and items are managed elsewhere, and some headers and parameters are not taken."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from .errors import Refused
from .namespace import Namespace, segments

if TYPE_CHECKING:
    from .service import Request

# Documented as ignored, and listed in x-ms-rejected-headers.
IGNORED = {
    "x-ms-owner",
    "x-ms-group",
    "x-ms-permissions",
    "x-ms-acl",
    "x-ms-acls",
    "x-ms-encryption-key",
    "x-ms-encryption-key-sha256",
    "x-ms-encryption-algorithm",
    "x-ms-access-tier",
}
CHANGES = {"create", "rename", "append", "flush", "delete", "delete_blob", "set_metadata", "put_blob", "put_block"}
CHANGES |= {"put_block_list", "undelete"}
MANAGED = 2  # an item, and its first level


@dataclass(slots=True)
class OneLake:
    """The rules, and the GUIDs of workspaces and items."""

    namespace: Namespace
    workspaces: dict[str, str] = field(default_factory=dict)
    items: dict[tuple[str, str], str] = field(default_factory=dict)

    def add_item(self, workspace: str, item: str) -> tuple[str, str]:
        """Make an item such as `sales.Lakehouse`, and its workspace, as Fabric does; their GUIDs."""
        if workspace not in self.namespace.filesystems:
            self.namespace.create_filesystem(workspace)
            self.workspaces[str(uuid.uuid4())] = workspace
        for name in ("Files", "Tables"):
            self.namespace.create(workspace, f"{item}/{name}", directory=True)
        guid = str(uuid.uuid4())
        self.items[workspace, guid] = item
        return next(id for id, name in self.workspaces.items() if name == workspace), guid

    def admit(self, verb: str, request: Request) -> tuple[Request, list[str]]:
        """The request as it is answered, under names and without what is ignored, and the headers that were."""
        if request.query.get("action") in ("setAccessControl", "setAccessControlRecursive"):
            raise Refused("UnsupportedQueryParameter")  # that it is refused is documented; the code was never recorded
        if "x-ms-lease-action" in request.headers or verb == "lease":
            raise Refused("UnsupportedQueryParameter")  # never recorded; leases are not documented here
        managed = "filesystem" in verb or verb == "unknown"
        if managed and (request.method != "HEAD" or not request.filesystem):
            raise Refused("UnsupportedHttpVerb")  # documented: workspaces take HEAD only; the code was never recorded
        filesystem, path = self._named(request.filesystem, request.path)
        headers = dict(request.headers)
        if verb == "rename":
            raw, mark, sas = headers["x-ms-rename-source"].partition("?")
            parts = segments(unquote(raw)) or [""]
            source = self._named(parts[0], "/".join(parts[1:]))
            self._changeable(*source)
            if " " not in raw and raw.isascii():
                headers["x-ms-rename-source"] = quote(f"/{source[0]}/{source[1]}") + mark + sas
        if verb in CHANGES:
            self._changeable(filesystem, path)
        query = dict(request.query)
        if directory := query.get("directory"):
            query["directory"] = self._named(request.filesystem, directory)[1]
        rejected = [name for name in headers if name in IGNORED]
        kept = {name: value for name, value in headers.items() if name not in IGNORED}
        return replace(request, filesystem=filesystem, path=path, query=query, headers=kept), rejected

    def _named(self, filesystem: str, path: str) -> tuple[str, str]:
        """Names for GUIDs, which are taken for both the workspace and the item, or for neither (documented)."""
        workspace = self.workspaces.get(filesystem)
        parts = segments(path)
        if not parts:
            return workspace or filesystem, path
        item = self.items.get((workspace or filesystem, parts[0]))
        if (workspace is None) != (item is None):
            raise Refused("InvalidQueryParameterValue")  # never recorded
        return workspace or filesystem, "/".join([item or parts[0], *parts[1:]])

    def _changeable(self, filesystem: str, path: str) -> None:
        parts = segments(path)
        if len(parts) <= MANAGED:
            raise Refused("OperationNotAllowedOnThePath")  # documented as not allowed; the code was never recorded
        self.namespace.find(filesystem, "/".join(parts[:MANAGED]))  # neither an item nor its first level is made
