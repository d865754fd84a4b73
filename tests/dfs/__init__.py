"""A server that answers as Azure Data Lake Storage Gen2 and OneLake do, on loopback, with faults at the wire.

    with DfsServer(plan="loses@rename:0") as server:
        DataLakeServiceClient(server.url, credential=...)

What it answers was recorded from the real service (tests/azure/dfs_facts.json); what nobody recorded it answers as the
REST specification says, and the code marks each such place `# never recorded`.
"""

from .faults import Fault, Plan
from .namespace import Conditions, Directory, File, Namespace
from .server import DfsServer
from .serving import Logged

__all__ = ["Conditions", "DfsServer", "Directory", "Fault", "File", "Logged", "Namespace", "Plan"]
