"""dgutils: discriminator guidance for diffusion models (Kim et al., ICML 2023), reproduced.

Rooms, from the ground up:

- the ranks of a run, if it has several: ``distributed``
- the method: ``noise``, ``edm`` and ``adm``, ``sampler``, ``discriminator``, ``guidance``; ``toy``, a world in two
  dimensions where all of it is known exactly
- networks in files: ``unpickle``, ``weights``, ``checkpoints``, ``inspection``, ``standins``
- data and scores: ``datasets``, ``metrics``; ``pretrain`` trains the networks that ship with the repository
- the study's steps, found or computed: ``store``, ``jobs``, ``study``
- what they say: ``trace``, ``results``, ``analysis``, ``plots``, ``report``, ``check_report``, ``site``
- running it: ``notebooks``, ``plan``, ``doctor``, ``bench_metrics``, ``bench``

A module imports only from rooms before it in this list, but for what a function needs to start another (a rank, a
process): tests/test_environment.py reads this.
"""

__version__ = "0.1.0"
