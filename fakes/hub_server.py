"""A hub that behaves like Hugging Face's where a data set is pushed: its HTTP API, in this process.

    async with FakeHub() as hub:
        ...  # HF_ENDPOINT=hub.url HF_TOKEN=hub.token

It keeps the files of every repository, and answers as the hub does to an unknown token, a name that is taken, and a
namespace of somebody else.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web


@dataclass
class Repository:
    """private: whether others may not read it. files: by path. messages: of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    messages: list[str] = field(default_factory=list)


class FakeHub:
    """refuse_commits: answer commits with this status, once each. repositories: by NAMESPACE/NAME."""

    def __init__(self, user: str = "me", token: str = "hf_of_the_fake") -> None:  # noqa: S107  a token of no hub
        self.user, self.token = user, token
        self.repositories: dict[str, Repository] = {}
        self.refuse_commits: list[int] = []
        self.asked: list[str] = []
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 28)
        at = "/api/datasets/{space}/{name}"
        app.add_routes(
            [
                web.get("/api/whoami-v2", self._whoami),
                web.post("/api/repos/create", self._create),
                web.post("/api/validate-yaml", self._validate),
                web.get(at, self._info),
                web.get(at + "/revision/main", self._info),
                web.post(at + "/preupload/main", self._preupload),
                web.post(at + "/commit/main", self._commit),
            ]
        )
        app.middlewares.append(self._guard)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return _refused(401, "Invalid username or password.")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _whoami(self, request: web.Request) -> web.Response:
        return web.json_response({"type": "user", "name": self.user, "orgs": []})

    async def _create(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        space = wanted.get("organization") or self.user
        name = f"{space}/{wanted['name']}"
        if space != self.user:
            return _refused(403, f'You don\'t have the rights to create a dataset under the namespace "{space}".')
        if wanted.get("type") != "dataset":
            return _refused(400, "This fake has data sets only")
        if name in self.repositories:
            return _refused(409, "You already created this dataset repo", url=f"{self.url}/datasets/{name}")
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        self.repositories[name] = Repository(private)
        return web.json_response({"url": f"{self.url}/datasets/{name}", "name": name, "id": name})

    async def _validate(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def _info(self, request: web.Request) -> web.Response:
        name, found = self._repository(request)
        if found is None:
            return _refused(404, "Repository not found", code="RepoNotFound")
        siblings = [{"rfilename": path} for path in found.files]
        return web.json_response(
            {
                "id": name,
                "private": found.private,
                "sha": f"{len(found.messages):040x}",
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "gated": False,
                "disabled": False,
            }
        )

    async def _preupload(self, request: web.Request) -> web.Response:
        files = (await request.json())["files"]
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
        return web.json_response({"files": modes})

    async def _commit(self, request: web.Request) -> web.Response:
        name, found = self._repository(request)
        if found is None:
            return _refused(404, "Repository not found", code="RepoNotFound")
        if self.refuse_commits:
            return _refused(self.refuse_commits.pop(0), "This fake refuses the commit")
        for line in (await request.text()).splitlines():
            part = json.loads(line)
            if part["key"] == "header":
                found.messages.append(part["value"]["summary"])
            elif part["key"] == "file":
                found.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
        oid = f"{len(found.messages):040x}"
        return web.json_response(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/datasets/{name}/commit/{oid}"}
        )

    def _repository(self, request: web.Request) -> tuple[str, Repository | None]:
        name = f"{request.match_info['space']}/{request.match_info['name']}"
        return name, self.repositories.get(name)


def _refused(status: int, message: str, *, code: str = "", **more: str) -> web.Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return web.json_response({"error": message, **more}, status=status, headers=headers)
