"""From an operation's settings to the operation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from data_prep.minhash import MinHashSettings
from data_prep.operations import config as settings
from data_prep.operations.base import Operation
from data_prep.operations.decontaminate import Decontaminate
from data_prep.operations.engine import Step
from data_prep.operations.eval_sets import named_apart, read_eval_set
from data_prep.operations.language import Language
from data_prep.operations.length import Length
from data_prep.operations.mixing import Mix
from data_prep.operations.near_duplicates import Duplicates, NearDuplicates
from data_prep.operations.personal import PersonalData
from data_prep.operations.preferences import PreferenceChecks
from data_prep.operations.quality import Quality
from data_prep.operations.semantic import SemanticDuplicates
from data_prep.operations.toxicity import Toxicity, load_scorer
from data_prep.operations.unicode import REPAIRS, Unicode
from data_prep.pii import OPTIONAL, RULES, Search, custom_rules
from data_prep.pii_presidio import NAMED_ENTITIES, Presidio, default_types, model_directory
from data_prep.semantic import check_model
from posttrain.errors import ConfigError, Problem, UserError

Locate = Callable[[str], Path]
"""The local path of an input of the stage, by its field: "operations.1.against.0"."""

KEY_BYTES = 16


@dataclass(frozen=True)
class Surroundings:
    """What of the stage some operations need. locate: paths of inputs; by_cluster: of the split."""

    locate: Locate
    by_cluster: bool = False


def build(configs: Sequence[Any], around: Surroundings) -> list[Step]:
    """The steps in their order.

    Raises ConfigError for what an operation needs and this machine lacks, UserError for an input that is no
    tokenizer or evaluation set.
    """
    found = problems(configs, "curate")
    if found:
        raise ConfigError(found)
    return [
        _step(config, _BUILDERS[type(config)](config, f"operations.{index}", around))
        for index, config in enumerate(configs)
    ]


def _step(config: Any, operation: Operation) -> Step:
    """Inputs are in the ledger by their names, not by where they lie: equal data give equal bytes."""
    said = settings.settings_of(config)
    if isinstance(operation, Decontaminate):
        said["against"] = {each.name: len(each.items) for each in operation.sets}
    if isinstance(config, settings.LengthConfig):
        said["tokenizer"] = PurePath(config.tokenizer).name
    if isinstance(config, settings.SemanticDuplicatesConfig):
        said["model"] = PurePath(config.model).name
    if isinstance(config, settings.PiiConfig):
        said |= _said_of_backend(config)
    return Step(config.op, operation, said, config.examples)


def _said_of_backend(config: settings.PiiConfig) -> dict[str, Any]:
    """Of a search with Presidio: its model by name, and the types that it cannot find without one."""
    model = config.presidio_model
    if config.backend == "presidio" and model is None:
        return {"presidio_model": None, "not_found_without_a_model": list(NAMED_ENTITIES)}
    return {"presidio_model": PurePath(model).name} if model else {}


def _near_duplicates(config: settings.NearDuplicatesConfig, where: str, around: Surroundings) -> Operation:
    minhash = MinHashSettings(config.threshold, config.words, config.bands, config.rows, config.seed)
    return NearDuplicates(minhash, config.part, config.keep, around.by_cluster, config.search == "exact")


def _semantic(config: settings.SemanticDuplicatesConfig, where: str, around: Surroundings) -> Operation:
    model = around.locate(f"{where}.model")
    check_model(model)
    return SemanticDuplicates(
        model,
        config.threshold,
        config.part,
        config.keep,
        config.part_rows,
        config.seed,
        around.by_cluster,
    )


def _decontaminate(config: settings.DecontaminateConfig, where: str, around: Surroundings) -> Operation:
    paths = [around.locate(f"{where}.against.{index}") for index in range(len(config.against))]
    return Decontaminate(
        named_apart([read_eval_set(path, config.fields) for path in paths]),
        config.part,
        config.ngram,
        config.coverage_ngram,
        config.coverage,
        config.common,
        config.review_above,
    )


def problems(configs: Sequence[Any], where: str) -> list[Problem]:
    """What speaks against the operations before anything is read: packages, scorers. where: of the stage."""
    found = []
    for index, config in enumerate(configs):
        place = f"{where}.operations.{index}"
        for package, extra in _packages(config):
            if importlib.util.find_spec(package) is None:
                remedy = f"pip install 'posttrain[{extra}]', or change the operation"
                message = f"{config.op} needs the package {package}, which is not installed"
                found.append(Problem(place, message, remedy, here=True))
        if isinstance(config, settings.ToxicityConfig):
            try:
                load_scorer(config.scorer)
            except UserError as error:
                message, _, remedy = str(error).partition("\n")
                found.append(Problem(f"{place}.scorer", message, remedy.strip(), here=True))
    return found


def _packages(config: Any) -> list[tuple[str, str]]:
    """What an operation needs of the optional packages, each with the extra that brings it."""
    needs: dict[type, tuple[str, str]] = {
        settings.LanguageConfig: ("py3langid", "data"),
        settings.SemanticDuplicatesConfig: ("sentence_transformers", "semantic"),
    }
    if isinstance(config, settings.UnicodeConfig) and config.mojibake:
        return [("ftfy", "data")]
    if isinstance(config, settings.PiiConfig) and config.backend == "presidio":
        return [("presidio_analyzer", "presidio")]
    return [needs[type(config)]] if type(config) in needs else []


def _unicode(config: settings.UnicodeConfig, where: str, around: Surroundings) -> Operation:
    switches = config.model_dump()
    return Unicode(tuple(name for name in REPAIRS if switches[name]))


def _language(config: settings.LanguageConfig, where: str, around: Surroundings) -> Operation:
    return Language(tuple(config.keep), config.min_confidence, config.min_letters, config.action, config.part)


def _length(config: settings.LengthConfig, where: str, around: Surroundings) -> Operation:
    path = around.locate(f"{where}.tokenizer")
    return Length(path, config.min_tokens, config.max_tokens, config.tag)


def _pii(config: settings.PiiConfig, where: str, around: Surroundings) -> Operation:
    types = config.types
    rules = RULES if types is None else tuple(rule for rule in (*RULES, *OPTIONAL) if rule.type in types)
    searches: tuple[Search, ...] = ()
    if config.backend == "presidio":
        model = around.locate(f"{where}.presidio_model") if config.presidio_model else None
        wanted = default_types(model is not None) if types is None else tuple(types)
        searches = (Presidio(wanted, model and model_directory(model)),)
    key = _key(around.locate(f"{where}.key_file")) if config.key_file else b""
    return PersonalData(config.action, (*rules, *custom_rules(config.patterns)), searches, key)


def _key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as a key ({error.strerror})\n"
            f"    give a file of {KEY_BYTES} or more random bytes"
        ) from error
    if len(key) < KEY_BYTES:
        raise UserError(
            f"{path}: {len(key)} bytes are no key\n    give a file of {KEY_BYTES} or more random bytes"
        )
    return key


def _mix(config: settings.MixConfig, where: str, around: Surroundings) -> Operation:
    temperature = 1.0 if config.temperature is None else config.temperature
    return Mix(config.weights, temperature, config.max_epochs, config.quotas, config.rows, config.seed)


_BUILDERS: dict[type, Callable[[Any, str, Surroundings], Operation]] = {
    settings.DuplicatesConfig: lambda config, where, around: Duplicates(),
    settings.NearDuplicatesConfig: _near_duplicates,
    settings.SemanticDuplicatesConfig: _semantic,
    settings.DecontaminateConfig: _decontaminate,
    settings.UnicodeConfig: _unicode,
    settings.LanguageConfig: _language,
    settings.QualityConfig: lambda config, where, around: Quality(
        tuple(config.chosen()), config.bounds, config.action, config.part
    ),
    settings.LengthConfig: _length,
    settings.PiiConfig: _pii,
    settings.ToxicityConfig: lambda config, where, around: Toxicity(
        load_scorer(config.scorer), config.above, config.part
    ),
    settings.PreferenceChecksConfig: lambda config, where, around: PreferenceChecks(),
    settings.MixConfig: _mix,
}
