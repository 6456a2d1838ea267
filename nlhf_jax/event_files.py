# SPDX-License-Identifier: Apache-2.0
"""Event files for TensorBoard."""

import os
import pathlib
import time
from collections.abc import Mapping


class EventFile:
    """A TensorBoard event file, written without TensorFlow.

    TensorBoard's own event writer imports TensorFlow where it is installed, seconds
    and a gigabyte for a few scalars; its record writer and protocol buffers do not.

    Args:
      folder: made if it is missing.
      resume_step: updates the run has seen; what older files say of later ones is
        dropped.
    """

    def __init__(self, folder: pathlib.Path, resume_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self._records = RecordWriter(open(folder / name, "wb"))  # noqa: SIM115
        self._write(file_version="brain.Event:2")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=resume_step + 1, session_log=started)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        rows = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]
        self._write(step=step, summary=self._summary(value=rows))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **fields) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()
