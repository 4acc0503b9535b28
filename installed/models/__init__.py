"""Stands for the folder `models/` in an installation.

There the modules of this project that import `models`, such as main.py, lie in `kernelwarehouse/app/`, with this file
beside them. It makes `models` another name of `kernelwarehouse`.
"""

import kernelwarehouse
from kernelwarehouse import one_package

one_package.join(__name__, kernelwarehouse.__version__)
