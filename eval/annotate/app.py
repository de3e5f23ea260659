"""The web application: pages for annotators. login.py and admin.py add theirs.

Every answer to a vote comes after the commit (POST, then a redirect to the page of the next item). Handlers
read the form, and leave the database to a few threads with a connection each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

from eval.annotate import assignment as assignments
from eval.annotate import votes
from eval.annotate.database import Database, Row, UnavailableError
from eval.annotate.pages import Pages
from eval.annotate.security import Guard, Guesses, HttpError, Origins, check_form, form_token
from eval.annotate.store import Study, sha256
from eval.annotate.votes import Opinion, RefusedError

LOG = logging.getLogger("posttrain.annotate")
THREADS = 4
MAX_FIELDS = 64
STATIC = {
    "annotate.css": "text/css; charset=utf-8",
    "annotate.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
T = TypeVar("T")
Form = dict[str, str]


class Annotation:
    """The application's state: a study, its database, the threads that use it."""

    def __init__(
        self, database: Database, study: Study, origins: Origins, clock: Callable[[], float] = time.time
    ) -> None:
        self.database = database
        self.study = study
        self.origins = origins
        self.clock = clock
        self.guesses = Guesses()
        self.pages = Pages(study)
        self.threads = ThreadPoolExecutor(THREADS, "database")
        prefix = "__Host-" if origins.secure else ""
        self.session_cookie, self.visitor_cookie = f"{prefix}annotate", f"{prefix}annotate-visitor"

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What `work`, which uses the database, returns."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def set_cookie(self, response: Response, name: str, value: str, seconds: float | None = None) -> None:
        """A cookie that no script reads, and that no other site's page makes a browser send."""
        response.set_cookie(
            name,
            value,
            max_age=None if seconds is None else int(seconds),
            path="/",
            httponly=True,
            samesite="strict",
            secure=self.origins.secure,
        )

    async def person(self, request: Request, role: str) -> Row:
        """Who is logged in: id, name and role. Raises SignInError for nobody, or somebody of another role."""
        cookie = request.cookies.get(self.session_cookie, "")
        now = self.clock()

        def find() -> list[Row]:
            with self.database.reading() as session:
                return session.run(
                    "SELECT a.id, a.name, a.role FROM sessions t JOIN annotators a ON a.id = t.annotator "
                    "WHERE t.sha256 = :sha256 AND t.expires > :now AND a.study = :study "
                    "AND a.revoked IS NULL AND a.role = :role",
                    sha256=sha256(cookie),
                    now=now,
                    study=self.study.id,
                    role=role,
                )

        rows = await self.in_thread(find) if cookie else []
        if not rows:
            raise SignInError
        return rows[0]

    async def form(self, request: Request, cookie: str | None = None) -> Form:
        """The fields of a form of this session. Raises HttpError."""
        fields = read_form(await request.body())
        name = self.session_cookie if cookie is None else cookie
        check_form(self.study, request.cookies.get(name, ""), fields.get("form", ""))
        return fields

    def form_token(self, request: Request) -> str:
        """For the forms of a page of this session."""
        return form_token(self.study, request.cookies.get(self.session_cookie, ""))

    def opinion(self, fields: Form) -> Opinion:
        """Comment and ratings of a form. Raises RefusedError."""
        ratings = {
            name: fields[f"rating-{name}"]
            for name in self.study.config.criteria
            if fields.get(f"rating-{name}") in votes.RATINGS
        }
        comment = fields.get("comment", "").replace("\r\n", "\n").strip()
        if len(comment) > votes.MAX_COMMENT_CHARACTERS:
            limit = votes.MAX_COMMENT_CHARACTERS
            raise RefusedError(f"The comment is longer than {limit} characters. Go back and shorten it.", 413)
        return Opinion(ratings, comment)


class SignInError(Exception):
    """Nobody is logged in who may see this."""


def read_form(body: bytes) -> Form:
    """Fields of application/x-www-form-urlencoded, the last of each name. Raises HttpError 400."""
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="replace"
        )
    except ValueError as error:
        raise HttpError(400, "This is not one of the study's forms.") from error
    return dict(pairs)


def make_app(annotation: Annotation) -> Guard:
    """The ASGI application."""
    from eval.annotate import admin, login

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        annotation.threads.shutdown(wait=True)
        annotation.database.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_errors(app, annotation)
    _add_static(app)
    login.add_login(app, annotation)
    _add_items(app, annotation)
    admin.add_admin(app, annotation)
    return Guard(app, annotation.origins)


def _add_errors(app: FastAPI, annotation: Annotation) -> None:
    pages = annotation.pages

    @app.exception_handler(SignInError)
    async def sign_in(request: Request, error: SignInError) -> Response:
        if request.headers.get("accept") == "application/json":
            return Response(status_code=401)
        return RedirectResponse("/login", 303)

    @app.exception_handler(HttpError)
    async def http_error(request: Request, error: HttpError) -> Response:
        return pages.message(str(error), error.status, error.headers)

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return pages.message(str(error), error.status)

    @app.exception_handler(UnavailableError)
    async def unavailable(request: Request, error: UnavailableError) -> Response:
        LOG.warning("%s %s: %s", request.method, request.url.path, error)
        text = (
            "The database does not answer, so what you sent may not be saved. Load this page again in a "
            "moment, which sends it again: it counts once."
        )
        return pages.message(text, 503, {"Retry-After": "5"})

    @app.exception_handler(404)
    async def not_found(request: Request, error: Exception) -> Response:
        return pages.message("There is nothing here.", 404)


def _add_static(app: FastAPI) -> None:
    def add(name: str, kind: str) -> None:
        content = (files("eval.annotate") / "static" / name).read_bytes()

        @app.get(f"/static/{name}")
        async def send() -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    for name, kind in STATIC.items():
        add(name, kind)


def _add_items(app: FastAPI, annotation: Annotation) -> None:
    database, study, clock = annotation.database, annotation.study, annotation.clock

    @app.get("/")
    async def item(request: Request) -> Response:
        person = await annotation.person(request, "annotator")

        def look() -> tuple[assignments.Task | None, dict[str, Any]]:
            with database.writing() as session:
                found = assignments.current(session, study, person["id"], clock())
                last = votes.last_done(session, person["id"])
                progress = assignments.progress(session, study, person["id"])
                return found, {**progress, "last": last and last["key"]}

        task, progress = await annotation.in_thread(look)
        return annotation.pages.item(person["name"], task, progress, annotation.form_token(request))

    def posted(path: str, act: Callable[[str, Form], None]) -> None:
        """A form of an annotator: `act` does what it says, in a thread, and then the next item is shown."""

        @app.post(path)
        async def handle(request: Request) -> Response:
            person = await annotation.person(request, "annotator")
            fields = await annotation.form(request)
            await annotation.in_thread(lambda: act(person["id"], fields))
            if request.headers.get("accept") == "application/json":
                return Response(status_code=204)
            return RedirectResponse("/", 303)

    def vote(annotator: str, fields: Form) -> None:
        votes.vote(
            database,
            study,
            annotator,
            fields.get("assignment", ""),
            fields.get("nonce", ""),
            fields.get("choice", ""),
            annotation.opinion(fields),
            clock(),
        )

    def skip(annotator: str, fields: Form) -> None:
        opinion = annotation.opinion(fields)
        reason = fields.get("reason", "")
        votes.skip(database, study, annotator, fields.get("assignment", ""), reason, opinion.comment, clock())

    def draft(annotator: str, fields: Form) -> None:
        opinion = annotation.opinion(fields)
        votes.draft(database, study, annotator, fields.get("assignment", ""), opinion, clock())

    posted("/vote", vote)
    posted("/skip", skip)
    posted("/draft", draft)
    posted(
        "/undo",
        lambda annotator, fields: votes.undo(database, study, annotator, fields.get("last", ""), clock()),
    )
