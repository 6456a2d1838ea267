# SPDX-License-Identifier: Apache-2.0
"""`nlhf JOB ...` that also writes which rows of each batch this process took."""

import faulthandler
import json
import sys

from nlhf_jax import cli, distributed
from nlhf_jax.data import batches
from nlhf_jax.jobs import runs

taken: list[dict] = []
compilations: list[int] = []


def watch(data_class):
    """Keeps what a store gives away: the batch's rows and the examples of them."""
    batch, take = data_class.batch, data_class.take

    def watched_batch(self, seed, step, batch_size, rows=None):
        taken.append({"step": step, "rows": rows.tolist(), "examples": []})
        return batch(self, seed, step, batch_size, rows)

    def watched_take(self, indices):
        if taken and not taken[-1]["examples"]:
            taken[-1]["examples"] = [int(index) for index in indices]
        return take(self, indices)

    data_class.batch, data_class.take = watched_batch, watched_take


def main(path, words):
    """Runs the command; `path` gets the number of this process added."""
    faulthandler.dump_traceback_later(390, exit=True)
    watch(batches.SupervisedData)
    watch(batches.ComparisonData)
    run = runs._FrozenStep.__call__

    def counted(self, *arguments):
        result = run(self, *arguments)
        compilations.append(self.num_compilations)
        return result

    runs._FrozenStep.__call__ = counted
    leave = distributed.leave

    def write_and_leave(code, reason=""):
        number = distributed._job.processes.process_id
        with open(f"{path}.{number}.json", "w") as file:
            json.dump({"taken": taken, "compilations": compilations}, file)
        leave(code, reason)

    distributed.leave = write_and_leave
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
