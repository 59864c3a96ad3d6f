"""The entry point `vllm.general_plugins`: with TIERMEM=1 vLLM serves over tiermem, or not at all.

vLLM calls `activate` in every process before it makes a configuration. It swallows what the import
of a plugin raises but not what the plugin itself raises; so nothing here is imported that could be
missing, and whatever is wrong stops the engine from here.
"""

from __future__ import annotations


def activate() -> None:
    """If TIERMEM is on, have every engine configuration made from here on name our connector.

    Raises ConfigError, or Unsupported with the way out, and then the engine does not start.
    """
    from tiermem.config import enabled, load

    if not enabled():
        return
    from tiermem.integrations import vllm_seams

    vllm_seams.refuse_unsupported()
    load()  # a configuration that cannot be meant stops the engine here, with its own message
    from vllm.engine.arg_utils import EngineArgs

    from tiermem.integrations import vllm_config

    vllm_config.inject_into(EngineArgs)
