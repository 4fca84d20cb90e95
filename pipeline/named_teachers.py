"""The teachers that a command names: one, or several with commas, and their weights in the same order.

The first one decides the recipe, and students are trained from it. The others' stores are filled in the same pass over
the images, with the same settings; a later command that names one of them finds that store.
"""

from pipeline.config import OtherTeacher, PipelineConfig
from storage.errors import ConfigError

SEVERAL = ("extract", "plan", "run")
"""Commands that fill the stores of several teachers."""


def split_teachers(text: str | None, command: str) -> tuple[str, ...]:
    """The names in the value of TEACHER.

    Raises:
        ConfigError: an empty or repeated name, or several where the command takes one.
    """
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if not all(names):
        raise ConfigError(f"TEACHER is {text!r}: there is no name beside a comma; write them as clip-l,dino-b")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"TEACHER names {repeated!r} twice; a store needs its teacher once")
    if len(names) > 1 and command not in SEVERAL:
        raise ConfigError(
            f"`{command}` works with one teacher, found {len(names)} ({', '.join(names)}); `extract`, `plan` and `run` "
            "take several. Name the one whose store it shall use"
        )
    return names


def with_others(config: PipelineConfig, named: tuple[str, ...]) -> PipelineConfig:
    """Settings whose further teachers are the named ones but the first; known ones keep their weights."""
    others = tuple(OtherTeacher(name=name, weights=config.teachers.get(name)) for name in named[1:])
    return config.model_copy(update={"also": others})


def with_weights(config: PipelineConfig, text: str | None, command: str) -> PipelineConfig:
    """Settings with the weights of a command's teachers: one entry each, with commas; an empty one, or `hub`, is the
    teacher's own source.

    Raises:
        ConfigError: another number of entries than of teachers.
    """
    if text is None:
        return config
    names = list(config.teachers) if command in SEVERAL else [config.extract.teacher]
    entries = [entry.strip() for entry in text.split(",")]
    if len(entries) != len(names):
        raise ConfigError(
            f"WEIGHTS has {len(entries)} entries ({text}) for {len(names)} teachers ({', '.join(names)}); give one for "
            "each, with commas, in their order; `hub` is a teacher's own source"
        )
    given = dict(zip(names, (None if entry in ("", "hub") else entry for entry in entries), strict=True))
    values = config.to_json()
    values["extract"]["weights"] = given[config.extract.teacher]
    for other in values["also"]:
        other["weights"] = given.get(other["name"], other["weights"])
    return PipelineConfig.checked(values, "settings")
