"""The admin's page: progress, agreement, annotators, disagreements, and the votes as preferences.

It names models. Who logs in with an annotator's token never gets it, and an admin does not vote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response

from eval.annotate.export import as_text, file_name, preferences
from eval.annotate.votes import standing_votes

if TYPE_CHECKING:
    from eval.annotate.app import Annotation


def add_admin(app: FastAPI, annotation: Annotation) -> None:
    """GET /admin and POST /admin/export."""

    @app.get("/admin")
    async def page(request: Request) -> Response:
        person = await annotation.person(request, "admin")

        def results() -> dict[str, Any]:
            # Brings scipy, which annotators' pages do without.
            from eval.annotate.quality import report

            return report(annotation.database, annotation.study)

        found = await annotation.in_thread(results)
        form = annotation.form_token(request)
        return annotation.pages.render("admin.html", name=person["name"], form=form, report=found)

    @app.post("/admin/export")
    async def export(request: Request) -> Response:
        await annotation.person(request, "admin")
        await annotation.form(request)

        def rows() -> str:
            with annotation.database.reading() as session:
                return as_text(preferences(standing_votes(session, annotation.study)).rows)

        text = await annotation.in_thread(rows)
        name = file_name(annotation.study)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(text, media_type="application/x-ndjson", headers=headers)
