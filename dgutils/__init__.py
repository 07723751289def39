"""dgutils: discriminator guidance for diffusion models (Kim et al., ICML 2023), reproduced.

Rooms, from the ground up: ``noise``, ``edm`` and ``adm``, ``checkpoints``, ``sampler``, ``discriminator``,
``guidance``, ``datasets`` and ``metrics``, ``store`` and ``jobs``, ``results`` and ``plots``.
A module imports only from rooms before it in this list.
"""

__version__ = "0.1.0"
