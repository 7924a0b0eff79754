"""Our models through transformers' own classes. Import this once, and they know them:

    import thimble.hub
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/.../checkpoints/step-2000")
    model.generate(ids, max_new_tokens=50)

Nothing is downloaded or unpickled, and no ``trust_remote_code`` is needed: the code is here.
Checkpoints of attention that runs once are llama or mistral, and need no import.

``generate`` gives thimble's own words. What it asks for of a recursive model stands in
``recursive``, of retention in ``retention``.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from thimble.hub.recursive import ThimbleRecursiveConfig, ThimbleRecursiveForCausalLM
from thimble.hub.retention import ThimbleRetNetConfig, ThimbleRetNetForCausalLM

__all__ = [
    "ThimbleRecursiveConfig",
    "ThimbleRecursiveForCausalLM",
    "ThimbleRetNetConfig",
    "ThimbleRetNetForCausalLM",
]

AutoConfig.register(ThimbleRecursiveConfig.model_type, ThimbleRecursiveConfig)
AutoModelForCausalLM.register(ThimbleRecursiveConfig, ThimbleRecursiveForCausalLM)
AutoConfig.register(ThimbleRetNetConfig.model_type, ThimbleRetNetConfig)
AutoModelForCausalLM.register(ThimbleRetNetConfig, ThimbleRetNetForCausalLM)
