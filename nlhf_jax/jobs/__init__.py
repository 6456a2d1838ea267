# SPDX-License-Identifier: Apache-2.0
"""The jobs of the command line: settings in, folders of results out.

`JOBS` names the module and the function of each; a job is imported when it runs.
`COMMANDS` take words instead of a gin configuration.
"""

JOBS = {
    "quickstart": "nlhf_jax.jobs.quickstart:quickstart",
    "reproduce": "nlhf_jax.jobs.reproduce:reproduce",
    "sft": "nlhf_jax.jobs.supervised:sft",
    "collect": "nlhf_jax.jobs.collect:collect",
    "preference": "nlhf_jax.jobs.supervised:preference",
    "reward": "nlhf_jax.jobs.supervised:reward",
    "train": "nlhf_jax.jobs.train:train",
    "evaluate": "nlhf_jax.jobs.evaluate:evaluate",
    "sample": "nlhf_jax.jobs.sample:sample",
    "exploration": "nlhf_jax.jobs.exploration:exploration",
    "convergence": "nlhf_jax.jobs.convergence:convergence",
}

COMMANDS = {
    "games": "nlhf_jax.jobs.games:main",
    "compile": "nlhf_jax.compile_command:main",
    "doctor": "nlhf_jax.jobs.doctor:main",
    "replay": "nlhf_jax.replay_command:main",
    "import": "nlhf_jax.jobs.conversions:import_model",
    "export": "nlhf_jax.jobs.conversions:export_model",
}
