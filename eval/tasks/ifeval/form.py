"""Instructions about the form of a response: marks, sections, start and end, repetition."""

from __future__ import annotations

import json
import re

from eval.tasks.ifeval.registry import instruction

CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@instruction("detectable_content:number_placeholders")
def placeholders(response: str, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets, as in `[address]`."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


@instruction("detectable_content:postscript")
def postscript(response: str, postscript_marker: str) -> bool:
    """A postscript starts with the marker, in any case; a space may stand between its letters."""
    marker = postscript_marker.strip().lower()
    if marker == "p.p.s":
        pattern = r"p\.\s?p\.\s?s"
    elif marker == "p.s.":
        pattern = r"p\.\s?s\."
    else:
        pattern = re.escape(marker)
    return re.search(pattern, response.lower()) is not None


@instruction("detectable_format:number_bullet_lists")
def bullets(response: str, num_bullets: int) -> bool:
    """Exactly so many lines that start with `*` or `-`; `**bold**` at the start is not a bullet."""
    starred = re.findall(r"^\s*\*[^*].*$", response, flags=re.MULTILINE)
    dashed = re.findall(r"^\s*-.*$", response, flags=re.MULTILINE)
    return len(starred) + len(dashed) == num_bullets


@instruction("detectable_format:constrained_response")
def constrained_response(response: str) -> bool:
    """One of the three allowed answers occurs."""
    return any(answer in response for answer in CONSTRAINED_ANSWERS)


@instruction("detectable_format:number_highlighted_sections")
def highlights(response: str, num_highlights: int) -> bool:
    """At least so many spans `*like this*` or `**like this**` with something in them."""
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(span.strip()) for span in single + double) >= num_highlights


@instruction("detectable_format:multiple_sections")
def sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings of the splitter and a number, as in `SECTION 1`."""
    heading = rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?"
    return len(re.findall(heading, response)) >= num_sections


@instruction("detectable_format:json_format")
def is_json(response: str) -> bool:
    """The whole response is one JSON value; a Markdown fence around it is allowed."""
    text = re.sub(r"\A```(?:json)?|```\Z", "", response.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets, as a model in a loop writes
        return False
    return True


@instruction("detectable_format:title")
def title(response: str) -> bool:
    """A title in double angular brackets on one line, not empty."""
    found = re.findall(r"<<[^\n]+>>", response)
    return any(one.lstrip("<").rstrip(">").strip() for one in found)


@instruction("combination:two_responses")
def two_responses(response: str) -> bool:
    """Two different responses divided by `******`; only the first and the last part may be empty."""
    parts = [part.strip() for part in response.split("******")]
    if not all(parts[1:-1]):
        return False
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1]


@instruction("combination:repeat_prompt")
def repeats_prompt(response: str, prompt_to_repeat: str) -> bool:
    """The response starts with the prompt, letter case aside."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction("startend:end_checker")
def ends_with(response: str, end_phrase: str) -> bool:
    """The last words are the phrase; quotation marks around the whole response are ignored."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("startend:quotation")
def is_quoted(response: str) -> bool:
    """The whole response stands in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


@instruction("punctuation:no_comma")
def has_no_comma(response: str) -> bool:
    """No comma anywhere."""
    return "," not in response
