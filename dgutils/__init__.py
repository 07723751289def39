"""dgutils: discriminator guidance for diffusion models (Kim et al., ICML 2023), reproduced.

Rooms, from the ground up; a module imports from its own room and from those below it, and from no other:

- the ground: ``errors``, ``paths``, ``files``, ``machine``, ``arrays`` (what users hand over), ``sources`` (files of
  images)
- the method, in this folder: noise, sampler, guidance, discriminator, training, metrics, datasets; toy, a 2-D world
  where all of it is known exactly
- ``networks``: architectures, their files and how those are read safely, training of the ones that are shipped
- ``pipeline``: the study's steps, found or computed, by one process or several; the notebooks' parameters and runs
- ``results``: what was recorded, what it says, figures, where a number comes from
- ``cli``: the command line
"""

__version__ = "0.1.0"
