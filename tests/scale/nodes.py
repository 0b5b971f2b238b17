"""A Ray cluster of several nodes on this machine, in a process of its own that is told what to do.

    nodes.py    prints the cluster's address, and then each line of standard input once it is done:
                "add" adds a node that has room for an engine, "kill" kills one

The head has no room for engines. The cluster ends with standard input.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.strip() == "add":
                cluster.add_node(num_cpus=1)
            else:
                cluster.remove_node(min(cluster.worker_nodes, key=id), allow_graceful=False)
            print(line.strip(), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
