# SPDX-License-Identifier: Apache-2.0
"""Submits a job: N processes here, TPU VMs, Compute Engine or a GKE cluster.

    python3 launch/submit.py --backend BACKEND [flags] -- JOB [nlhf flags]

What stands after `--` is the command line of `nlhf`. `--backend BACKEND --help`
prints a backend's flags; docs/launching.md says what happens at each fault.
"""

import os
import pathlib
import sys


def main(words: list[str]) -> int:
    """Submits the job and returns the exit code (table in docs/launching.md)."""
    from launch import backends, errors, flags

    try:
        backend, options, job = flags.parse(words)
        if options is None:
            print(flags.usage(backend))
            return 0 if words else errors.USAGE
        return backends.load(backend).submit(options, job)
    except BrokenPipeError:
        # Whoever read our output has enough; Python must not flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("submit: interrupted", file=sys.stderr)
        return errors.INTERRUPTED
    except errors.SubmitError as error:
        print(f"submit: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    # The folder of this file is on the path; its package is one above, and there the
    # job runs, as with launch/here.py: paths in its flags are relative to it.
    os.chdir(pathlib.Path(__file__).resolve().parent.parent)
    sys.path[0] = os.getcwd()
    sys.exit(main(sys.argv[1:]))
