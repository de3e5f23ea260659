"""Patterns and checks of `data_prep.pii`: one rule per way in which a kind of personal data is written.

Every pattern is read in time linear in the text, whatever the text: repeats are possessive or have a small
bound, and an unbounded one begins only where its own characters do not stand before it. `re.ASCII`, except
for e-mail addresses.

What is repeated possessively has no choice inside: Python before 3.11.5 matches that wrongly
(github.com/python/cpython/issues/106052). A lookahead whose text is then asked for again stands for it.

Sources: card numbers ISO/IEC 7812-1 (Luhn), IBAN ISO 13616 and its registry (lengths), SSN rules of the
Social Security Administration (2011), phone numbers E.164 and the North American plan; keys and tokens as
their vendors document them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

Check = Callable[[re.Match[str]], tuple[int, int] | None]
"""The part of a match that is what the rule looks for, as (start, end) in the text; None: it is not."""


@dataclass(frozen=True)
class Rule:
    """One pattern. hints: the text holds one of these, or the rule is not tried; none: it holds a digit."""

    type: str
    pattern: re.Pattern[str]
    hints: tuple[str, ...] = ()
    check: Check = lambda match: match.span(match.lastindex or 0)


def _rule(type: str, pattern: str, hints: tuple[str, ...] = (), check: Check | None = None) -> Rule:
    compiled = re.compile(pattern, re.VERBOSE if type == "EMAIL" else re.VERBOSE | re.ASCII)
    return Rule(type, compiled, hints, check) if check else Rule(type, compiled, hints)


def luhn(number: str) -> bool:
    """Whether the check digit of a number of digits fits (ISO/IEC 7812-1, annex B)."""
    digits = [int(digit) for digit in reversed(number)]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _card(match: re.Match[str]) -> tuple[int, int] | None:
    number = re.sub("[ -]", "", match.group())
    issuer = number[0] in "23456" or number.startswith(("1800", "0604"))
    return match.span() if issuer and len(set(number)) > 1 and luhn(number) else None


IBAN_LENGTHS = {
    code[:2]: int(code[2:])
    for code in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 "
        "DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 "
        "IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 "
        "MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 "
        "SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
    ).split()
}


def _iban(match: re.Match[str]) -> tuple[int, int] | None:
    """Cut to the country's length, since words may follow the last group."""
    text = match.group()
    wanted, taken, end = IBAN_LENGTHS.get(text[:2].upper(), 0), 0, 0
    while taken < wanted and end < len(text):
        taken += text[end] not in " -"
        end += 1
    if not wanted or taken < wanted or text[end : end + 1].isalnum():
        return None
    iban = re.sub("[ -]", "", text[:end]).upper()
    remainder = int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97
    return (match.start(), match.start() + end) if remainder == 1 else None


def _ip(match: re.Match[str]) -> tuple[int, int] | None:
    text = match.group().rstrip(":")
    if ":" in text and not any(character.isdigit() for character in text):
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if address.is_unspecified else (match.start(), match.start() + len(text))


_DATES = {(4, 2, 2), (2, 2, 4), (2, 2, 2)}
_HYPHENED = {(3, 3, 4), (1, 3, 3, 4), (3, 3, 3, 4), (3, 4), (2, 2, 2, 2), (3, 3, 3), (2, 8), (4, 7), (3, 7)}
_YEAR = re.compile("1[5-9]|20|21")


_CALLED = re.compile(
    r"\b(?:tel|telephone|phone|fax|mobile|cell|call(?: me| us)?|dial)"
    r"(?: number| no\.?)?(?: is| at| on)?[.:]{0,2}\s?$",
    re.I,
)
_CALLED_BEHIND = re.compile(r"(?P<dash>-| -\ )?\ ?(?:office|fax|mobile|cell|home)\b", re.I)


def _said_to_be_phone(match: re.Match[str], groups: int) -> bool:
    """Said beside the digits: "call 33 93 31", "61 51 81 office"; not "655502 cell phones"."""
    if _CALLED.search(match.string[max(match.start() - 40, 0) : match.start()]):
        return True
    behind = _CALLED_BEHIND.match(match.string, match.end())
    return behind is not None and (groups > 1 or behind["dash"] is not None)


def _phone(match: re.Match[str]) -> tuple[int, int] | None:
    """Groups of digits as phone numbers have them, and as dates, sums and decimal numbers have not.

    What is called a phone number beside it may have any groups.
    """
    text = match.group()
    main, _, extension = text.partition("x")
    groups = re.findall("[0-9]+", main)
    digits = sum(map(len, groups))
    if 6 <= digits <= 15 and _said_to_be_phone(match, len(groups)):
        return match.span()
    if text[0] == "+":
        return match.span() if 8 <= digits <= 15 else None
    if not 7 <= digits <= 13:
        return None
    if "(" in text or extension:
        return match.span()
    if len(groups) == 1:
        return match.span() if digits == 10 and groups[0][0] in "23456789" and groups[0][3] > "1" else None
    sizes = tuple(map(len, groups))
    if "-" in main and (sizes not in _HYPHENED or all(group[-1] == "0" for group in groups)):
        return None
    years = all(len(group) == 4 and _YEAR.match(group) for group in groups)
    if sizes in _DATES or years or max(sizes[2:], default=0) > 4 or (digits == 7 and sizes != (3, 4)):
        return None
    if "." in main and sizes not in {(3, 3, 4), (2, 2, 2, 2, 2), (3, 3, 3, 4)}:
        return None
    return match.span()


def _url(match: re.Match[str]) -> tuple[int, int] | None:
    """Without the punctuation of the sentence that it ends; a closing bracket belongs to an opening one."""
    text = match.group().rstrip(".,;:!?*_")
    while text.endswith((")", "]", "}")) and text.count(text[-1]) > text.count("([{"[")]}".index(text[-1])]):
        text = text[:-1].rstrip(".,;:!?*_")
    return (match.start(), match.start() + len(text)) if "." in text[4:] or "localhost" in text else None


def _mixed(match: re.Match[str]) -> tuple[int, int] | None:
    """Random characters, not words with hyphens."""
    text = match.group()
    random = any(map(str.isdigit, text)) and any(map(str.isupper, text)) and any(map(str.islower, text))
    return match.span() if random else None


_KEY = r"(?<![A-Za-z0-9_-])"
_IS = r"""["']?\s{0,4}+[:=]\s{0,4}+["']?"""

RULES: tuple[Rule, ...] = (
    _rule(
        "PRIVATE_KEY",
        r"-----BEGIN\ (?:[A-Z]{2,9}+\ )??PRIVATE\ KEY(?:\ BLOCK)?-----(?:"
        r"(?:-{0,4}+[^-])*+-----END\ [A-Z ]{0,40}+-----|[A-Za-z0-9+/=\\\s]*+)",
        ("PRIVATE KEY",),
    ),
    _rule(
        "URL_CREDENTIALS",
        r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{1,20}+://[^\s/@:]{0,128}+:[^\s/@]{1,256}+(?:@[^\s/@]{0,64}+){0,3}@"
        r"(?:[\w-]{1,63}+(?:\.[\w-]{1,63}+){0,8}|\[[0-9A-Fa-f:.]{2,45}+\])(?::[0-9]{1,5}+)?",
        ("://",),
    ),
    _rule(
        "AWS_KEY",
        _KEY + r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Za-z0-9])",
        ("AKIA", "ASIA", "ABIA", "ACCA"),
    ),
    _rule(
        "AWS_KEY",
        r"(?i:secret[_ -]?access[_ -]?key|aws[_ -]?secret(?:[_ -]?key)?)"
        + _IS
        + r"([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
        ("ecret", "ECRET"),
    ),
    _rule("GCP_KEY", _KEY + r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", ("AIza",)),
    _rule("GCP_KEY", _KEY + r"(?:ya29\.|GOCSPX-)[A-Za-z0-9_-]{20,}+", ("ya29.", "GOCSPX-")),
    _rule(
        "AZURE_KEY",
        r"(?:AccountKey|SharedAccessKey)=([A-Za-z0-9+/]{40,88}+={0,2})|[?&]sig=([A-Za-z0-9%/+]{40,120}+=?)",
        ("AccountKey=", "SharedAccessKey=", "sig="),
    ),
    _rule("AZURE_KEY", r"(?<![\w~.-])[\w~.-]{3}[0-9]Q~[\w~.-]{31,34}(?![\w~-])", ("Q~",)),
    _rule(
        "GITHUB_TOKEN",
        _KEY + r"(?:gh[pousr]_[A-Za-z0-9]{36,}+|github_pat_[A-Za-z0-9_]{22,}+)",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    ),
    _rule("SLACK_TOKEN", _KEY + r"(?:xox[a-z]|xapp)-[A-Za-z0-9-]{10,}+", ("xox", "xapp-")),
    _rule("SLACK_TOKEN", r"hooks\.slack\.com/services/([A-Za-z0-9/]{20,}+)", ("hooks.slack.com",)),
    _rule("OPENAI_KEY", _KEY + r"sk-[A-Za-z0-9_-]{20,}+", ("sk-",), _mixed),
    _rule("GATEWAY_KEY", _KEY + r"pt-[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])", ("pt-",), _mixed),
    _rule("HUGGINGFACE_TOKEN", _KEY + r"hf_[A-Za-z0-9]{30,}+", ("hf_",)),
    _rule("JWT", _KEY + r"eyJ[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{4,}+\.[A-Za-z0-9_-]*+", ("eyJ",)),
    _rule("EMAIL", r"(?<![\w.%+-])[\w.%+-]++@(?:[\w-]{1,63}+\.){1,8}[^\W\d_]{2,24}(?![\w-])", ("@",)),
    _rule("IBAN", r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[ -]?+[A-Za-z0-9]{1,4}+){3,9}", (), _iban),
    _rule(
        "CREDIT_CARD",
        r"(?<![\w.+-])(?:[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{3})?"
        r"|[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5}|[0-9]{12,19}+)(?![\w-]|\.[0-9])",
        (),
        _card,
    ),
    _rule(
        "SSN",
        r"(?<![\w.-])(?!000|666|9)[0-9]{3}([ -])(?!00)[0-9]{2}\1(?!0000)[0-9]{4}(?![\w-]|\.[0-9])",
        (),
        lambda match: match.span(),
    ),
    _rule("IP", r"(?<![\w.-])[0-9]{1,3}+(?:\.[0-9]{1,3}+){3}(?![\w-]|\.[0-9])", (".",), _ip),
    _rule(
        "IP",
        r"(?<![\w:.])[0-9A-Fa-f]{0,4}+:[0-9A-Fa-f]{0,4}+:[0-9A-Fa-f:]{0,34}+(?:[0-9.]{7,15}+)?(?!\w)",
        (":",),
        _ip,
    ),
    _rule(
        "PHONE",
        r"(?<![\w$€£%\#+/.-])(?<![0-9][,:])(?:\+[0-9]{1,3}+[ .-]?|\+)?(?:\([0-9]{1,5}+\)[ .-]?)?"
        r"[0-9]{1,12}+(?=(?P<groups>(?:[ .-][0-9]{2,8}+){0,5}))(?P=groups)"
        r"(?:\ ?x[0-9]{1,6}+)?(?![\w%/]|[.,:-][0-9])",
        (),
        _phone,
    ),
)
"""In order of precedence: what two rules find in one place has the type of the first."""
OPTIONAL: tuple[Rule, ...] = (
    _rule(
        "URL",
        r"(?<![A-Za-z0-9])(?i:https?://|ftp://|www\.)[^\s<>\"'`]{1,2000}+",
        ("://", "www.", "WWW."),
        _url,
    ),
)
"""Rules that run only where their type is asked for: a public address is seldom personal."""
TYPES: tuple[str, ...] = tuple(dict.fromkeys(rule.type for rule in RULES))
