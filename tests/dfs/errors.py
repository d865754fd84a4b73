"""The service's errors: code, status and text; the same event has another code on the Blob endpoint."""

from __future__ import annotations

# Codes and texts are recorded, or of the REST specification's error list.
ERRORS: dict[str, tuple[int, str]] = {
    "AuthorizationPermissionMismatch": (
        403,
        "This request is not authorized to perform this operation using this permission.",
    ),
    "BlobAlreadyExists": (409, "The specified blob already exists."),
    "BlobNotFound": (404, "The specified blob does not exist."),
    "BlobOperationNotSupported": (409, "Blob operation is not supported."),
    "ConditionNotMet": (412, "The condition specified using HTTP conditional header(s) is not met."),
    "ContainerAlreadyExists": (409, "The specified container already exists."),
    "ContainerNotFound": (404, "The specified container does not exist."),
    "DirectoryIsNotEmpty": (409, "This operation is not permitted on a non-empty directory."),
    "DirectoryNotEmpty": (409, "The recursive query parameter value must be true to delete a non-empty directory."),
    "FilesystemAlreadyExists": (409, "The specified filesystem already exists."),
    "FilesystemNotFound": (404, "The specified filesystem does not exist."),
    "InternalError": (500, "Server encountered an internal error. Please try again after some time."),
    "InvalidAuthenticationInfo": (401, "Server failed to authenticate the request."),
    "InvalidBlockList": (400, "The specified block list is invalid."),
    "InvalidDestinationPath": (
        409,
        "The specified path, or an element of the path, exists and its resource type is invalid for this operation.",
    ),
    "InvalidFlushOperation": (409, "The resource was created or modified by the Blob Service API."),
    "InvalidFlushPosition": (
        400,
        "The uploaded data is not contiguous or the position query parameter value is not equal to the length of the "
        "file after appending the uploaded data.",
    ),
    "InvalidHeaderValue": (400, "The value for one of the HTTP headers is not in the correct format."),
    "InvalidQueryParameterValue": (
        400,
        "Value for one of the query parameters specified in the request URI is invalid.",
    ),
    "InvalidRange": (416, "The range specified is invalid for the current size of the resource."),
    "InvalidRenameSourcePath": (
        409,
        "The source directory cannot be the same as the destination directory, nor can the destination be a "
        "subdirectory of the source directory.",
    ),
    "InvalidSourceOrDestinationResourceType": (409, "The source and destination resource type must be identical."),
    "InvalidSourceUri": (400, "The source URI is invalid."),
    "LeaseAlreadyPresent": (409, "There is already a lease present."),
    "LeaseIdMismatch": (412, "The lease ID specified did not match the lease ID for the resource."),
    "LeaseIdMismatchWithBlobOperation": (412, "The lease ID specified did not match the lease ID for the blob."),
    "LeaseIdMismatchWithLeaseOperation": (
        409,
        "The lease ID specified did not match the lease ID for the resource with the specified lease operation.",
    ),
    "LeaseIdMissing": (412, "There is currently a lease on the resource and no lease ID was specified in the request."),
    "LeaseIsBreakingAndCannotBeAcquired": (
        409,
        "The lease ID matched, but the lease is currently in breaking state and cannot be acquired until it is broken.",
    ),
    "LeaseIsBreakingAndCannotBeChanged": (
        409,
        "The lease ID matched, but the lease is currently in breaking state and cannot be changed.",
    ),
    "LeaseIsBrokenAndCannotBeRenewed": (
        409,
        "The lease ID matched, but the lease has been broken explicitly and cannot be renewed.",
    ),
    "LeaseLost": (412, "A lease ID was specified, but the lease for the resource has expired."),
    "LeaseNotPresent": (412, "There is currently no lease on the resource."),
    "LeaseNotPresentWithBlobOperation": (412, "There is currently no lease on the blob."),
    "LeaseNotPresentWithLeaseOperation": (
        409,
        "There is currently no lease on the resource with the specified lease operation.",
    ),
    "MissingRequiredQueryParameter": (400, "A query parameter that's mandatory for this request is not specified."),
    "NoAuthenticationInformation": (401, "Server failed to authenticate the request."),
    "OperationNotAllowedOnThePath": (403, "The operation is not allowed on the specified path."),
    "OperationNotSupportedOnDirectory": (400, "The requested operation is not supported on a directory."),
    "OutOfRangeQueryParameterValue": (
        400,
        "A query parameter specified in the request URI is outside the permissible range.",
    ),
    "PathAlreadyExists": (409, "The specified path already exists."),
    "PathConflict": (
        409,
        "The specified path, or an element of the path, exists and its resource type is invalid for this operation.",
    ),
    "PathIsTooDeep": (409, "This operation is not permitted as the path is too deep."),
    "PathNotFound": (404, "The specified path does not exist."),
    "RenameDestinationParentPathNotFound": (404, "The parent directory of the destination path does not exist."),
    "ServerBusy": (503, "The server is busy."),
    "SourceConditionNotMet": (412, "The source condition specified using HTTP conditional header(s) is not met."),
    "SourcePathNotFound": (404, "The source path for a rename operation does not exist."),
    "TooManyRequests": (429, "The request rate is too high."),
    "UnsupportedHttpVerb": (405, "The resource doesn't support the specified HTTP verb."),
    "UnsupportedQueryParameter": (400, "One of the query parameters specified in the request URI is not supported."),
}

ON_BLOB = {
    "DirectoryNotEmpty": "DirectoryIsNotEmpty",
    "FilesystemAlreadyExists": "ContainerAlreadyExists",
    "FilesystemNotFound": "ContainerNotFound",
    "LeaseIdMismatch": "LeaseIdMismatchWithBlobOperation",
    "LeaseNotPresent": "LeaseNotPresentWithBlobOperation",
    "PathAlreadyExists": "BlobAlreadyExists",
    "PathNotFound": "BlobNotFound",
}


class Refused(Exception):
    """The service refuses a request; `code` is the Data Lake endpoint's name of the reason.

    Args:
        header: The header that was at fault, and its value.
        extra: Headers of the answer.
        status: Where it is not the code's own.
    """

    def __init__(
        self,
        code: str,
        *,
        header: tuple[str, str] | None = None,
        extra: dict[str, str] | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.header = header
        self.extra = extra or {}
        self.status = status
