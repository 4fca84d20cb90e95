"""The teachers that a command names: one, or several with commas, and their weights in the same order.

The first one decides the recipe. To `extract`, the others' stores are filled in the same pass over the images, with the
same settings, and students are trained from the first one's store; a later command that names one of them finds that
store. To `distill`, a student learns from the stores of all that are named.
"""

from pipeline.config import OtherTeacher, PipelineConfig
from storage.errors import ConfigError

FILLING = ("extract", "plan", "run")
"""Commands that fill the stores of several teachers."""
LEARNING = "distill"
"""The command that trains a student from the stores of several."""


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
    if len(names) > 1 and command not in (*FILLING, LEARNING):
        raise ConfigError(
            f"`{command}` works with one teacher, found {len(names)} ({', '.join(names)}); `extract`, `plan`, `run` "
            f"and `{LEARNING}` take several. Name the one whose store it shall use, or none to go on from the command "
            "before"
        )
    return names


def with_named(config: PipelineConfig, named: tuple[str, ...], command: str) -> PipelineConfig:
    """Settings after a command named teachers, the first of which leads already. What is known of them stays: their
    weights and, where students learn from several, how much each one counts."""
    if not named:
        return config
    known, alone = {other.name: other for other in config.also}, learning_alone(config)
    if command in FILLING:
        filled = {other.name: other for other in alone.also}
        return alone.model_copy(update={"also": tuple(filled.get(name, OtherTeacher(name=name)) for name in named[1:])})
    others = [known.get(name, OtherTeacher(name=name)) for name in named[1:]]
    learnt = [other.model_copy(update={"loss_weight": other.loss_weight or 1.0}) for other in others]
    rest = [other for other in alone.also if other.name not in named]
    return alone.model_copy(update={"also": (*learnt, *rest)})


def learning_alone(config: PipelineConfig) -> PipelineConfig:
    """The same settings; students learn from the first teacher alone."""
    others = tuple(other.model_copy(update={"loss_weight": None}) for other in config.also)
    return config.model_copy(update={"also": others})


def with_weights(config: PipelineConfig, text: str | None, command: str) -> PipelineConfig:
    """Settings with the weights of a command's teachers: one entry each, with commas; an empty one, or `hub`, is the
    teacher's own source.

    Raises:
        ConfigError: another number of entries than of teachers.
    """
    if text is None:
        return config
    learnt = [config.extract.teacher, *(other.name for other in config.also_learnt)]
    names = list(config.teachers) if command in FILLING else learnt
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
