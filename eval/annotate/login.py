"""Logging in with a token, and out. The browser keeps a session's cookie, the database its hash."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

from eval.annotate.database import Row
from eval.annotate.security import form_token, is_known, known_visitor
from eval.annotate.store import find_by_token, sha256

if TYPE_CHECKING:
    from eval.annotate.app import Annotation

SESSION_SECONDS = 7 * 24 * 3600.0
KNOWN_SECONDS = 90 * 24 * 3600.0
"""So long a browser that has logged in answers for its own wrong tokens alone."""


def add_login(app: FastAPI, annotation: Annotation) -> None:
    """GET and POST /login, POST /logout."""

    @app.get("/login")
    async def login_page(request: Request) -> Response:
        visitor = request.cookies.get(annotation.visitor_cookie) or secrets.token_urlsafe(32)
        response = annotation.pages.login(form_token(annotation.study, visitor))
        lasts = KNOWN_SECONDS if is_known(annotation.study, visitor) else None
        annotation.set_cookie(response, annotation.visitor_cookie, visitor, lasts)
        return response

    @app.post("/login")
    async def login(request: Request) -> Response:
        fields = await annotation.form(request, annotation.visitor_cookie)
        token = fields.get("token", "").strip()
        address = request.client.host if request.client else ""
        visitor = request.cookies.get(annotation.visitor_cookie, "")
        source = visitor if is_known(annotation.study, visitor) else address

        def find() -> Row | None:
            with annotation.database.reading() as session:
                return find_by_token(session, annotation.study, token)

        person = await annotation.guesses.attempt(source, lambda: annotation.in_thread(find))
        if person is None:
            text = "This token is not valid. Ask for a new one where you got it."
            return annotation.pages.login(fields["form"], text, 403)
        # Never the cookie that came with the request: somebody else may have set that (session fixation).
        made = secrets.token_urlsafe(32)
        old = request.cookies.get(annotation.session_cookie, "")

        def keep() -> None:
            now = annotation.clock()
            with annotation.database.writing() as session:
                session.run(
                    "DELETE FROM sessions WHERE sha256 = :old OR expires <= :now", old=sha256(old), now=now
                )
                session.run(
                    "INSERT INTO sessions (sha256, annotator, expires) "
                    "VALUES (:sha256, :annotator, :expires)",
                    sha256=sha256(made),
                    annotator=person["id"],
                    expires=now + SESSION_SECONDS,
                )

        await annotation.in_thread(keep)
        response = RedirectResponse("/admin" if person["role"] == "admin" else "/", 303)
        annotation.set_cookie(response, annotation.session_cookie, made, SESSION_SECONDS)
        known = known_visitor(annotation.study)
        annotation.set_cookie(response, annotation.visitor_cookie, known, KNOWN_SECONDS)
        return response

    @app.post("/logout")
    async def logout(request: Request) -> Response:
        await annotation.form(request)
        cookie = request.cookies.get(annotation.session_cookie, "")

        def end() -> None:
            with annotation.database.writing() as session:
                session.run("DELETE FROM sessions WHERE sha256 = :sha256", sha256=sha256(cookie))

        await annotation.in_thread(end)
        response = RedirectResponse("/login", 303)
        annotation.set_cookie(response, annotation.session_cookie, "", 0)
        return response
