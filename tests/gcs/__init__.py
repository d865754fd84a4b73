"""A server that answers as Google Cloud Storage's JSON API does, on loopback, with faults at the wire.

    with GcsServer(plan="loses@move:0") as server:
        server.store.create_bucket("bucket")
        storage.Client("project", AnonymousCredentials(), client_options={"api_endpoint": server.url})

What it answers follows Google's reference, https://cloud.google.com/storage/docs/json_api/v1; what that does not say is
marked `# undocumented` in the code. The faults are those of the Data Lake server: `dfs.faults`.
"""

from dfs.faults import Fault, Plan
from dfs.serving import Logged

from .server import GcsServer
from .store import Bucket, Conditions, Object, Store

__all__ = ["Bucket", "Conditions", "Fault", "GcsServer", "Logged", "Object", "Plan", "Store"]
