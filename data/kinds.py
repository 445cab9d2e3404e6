"""The batches of each data.kind, imported when they are asked for."""

from typing import Any

from comet_pl.config.schema import (
    AgentData,
    PasskeyData,
    PlainTextData,
    ScrollsData,
    UserBehaviorData,
)

DataSection = PasskeyData | ScrollsData | AgentData | UserBehaviorData | PlainTextData


def batches_of(data: DataSection) -> Any:
    """The subclass of Batches that reads what the data section names."""
    if isinstance(data, PasskeyData):
        from data.passkey import PasskeyBatches

        return PasskeyBatches
    if isinstance(data, AgentData):
        from data.agent_traces import AgentBatches

        return AgentBatches
    if isinstance(data, UserBehaviorData):
        from data.user_behavior import UserBehaviorBatches

        return UserBehaviorBatches
    if isinstance(data, PlainTextData):
        from data.plain_text import PlainTextBatches

        return PlainTextBatches
    from data.scrolls import ScrollsBatches

    return ScrollsBatches


def content_of(data: DataSection) -> dict[str, list[list[Any]]]:
    """What the files of a data section hold, wherever they are.

    {role: [[name, bytes, SHA-256], ...]}, the files of a role in the order in which they are read.
    The role of a file begins with `train` or `validation`.

    Raises:
        UserError: a file cannot be read; there are none.
    """
    from comet_pl.files import sha256

    roles = batches_of(data).files(data)
    return {
        role: [[path.name, path.stat().st_size, sha256(path)] for path in paths]
        for role, paths in roles.items()
        if paths
    }
