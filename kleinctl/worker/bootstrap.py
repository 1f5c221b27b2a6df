"""Starts a worker in a Python that need not have kleinctl: `<python> -I -u -X utf8 bootstrap.py`.

It uses the standard library alone. The first line on stdin says where kleinctl and the plugin lie. Only those are made
importable, by name: were the folder that holds them put on `sys.path`, the control process's packages would come along
and shadow the versions that this environment was built with.
"""

import faulthandler
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys


class Elsewhere:
    """Finds the top-level modules it was told of, wherever they lie; the rest is left to Python's own finders."""

    def __init__(self, modules):
        self.modules = modules

    def find_spec(self, name, path=None, target=None):
        if name not in self.modules:
            return None
        origin, folders = self.modules[name]["origin"], self.modules[name]["folders"]
        if origin is None:  # a namespace package has folders and no file
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = folders
            return spec
        return importlib.util.spec_from_file_location(name, origin, submodule_search_locations=folders)


def main():
    """Keep the pipes for the protocol, and begin."""
    # Libraries print to file descriptor 1 and some ask questions on 0, from C as well: they get the log and no answer.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    if sys.platform != "win32":
        faulthandler.register(signal.SIGUSR1)  # the control process asks so where a silent worker hangs
    if sys.version_info < (3, 10):  # noqa: UP036 (it may be any Python)
        sys.exit("kleinctl needs Python 3.10 or newer; {} is {}.{}".format(sys.executable, *sys.version_info[:2]))
    setup = json.loads(requests.readline())
    sys.meta_path.insert(0, Elsewhere(setup["modules"]))
    from kleinctl.worker.main import serve

    serve(requests, replies, die_with_control=setup["die_with_control"])


if __name__ == "__main__":
    main()
