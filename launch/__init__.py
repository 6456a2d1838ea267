# SPDX-License-Identifier: Apache-2.0
"""How jobs are started: here, in several processes, on TPU VMs, on a cluster.

Standard library only: nothing in this folder imports jax or `nlhf_jax`.
"""
