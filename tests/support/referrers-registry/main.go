// Command referrers-registry is a registry with the referrers API, for the tests: the one of go-containerregistry, with
// its blobs on disk, and with the OCI-Subject header that the distribution specification asks for and that it leaves out.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"log"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/registry"
)

const manifestMax = 8 << 20

func main() {
	listen := flag.String("listen", "127.0.0.1:5000", "address and port")
	blobs := flag.String("blobs", ".", "directory for the blobs")
	subject := flag.Bool("oci-subject", true, "answer with OCI-Subject")
	flag.Parse()
	handler := registry.New(
		registry.WithReferrersSupport(true),
		registry.WithBlobHandler(registry.NewDiskBlobHandler(*blobs)),
	)
	if *subject {
		handler = withSubject(handler)
	}
	log.Fatal(http.ListenAndServe(*listen, handler))
}

// withSubject says which subject a manifest has that comes in. (Refusals say it, too, where nobody looks.)
func withSubject(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, manifestMax))
			if err != nil {
				http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
				return
			}
			var manifest struct {
				Subject struct {
					Digest string `json:"digest"`
				} `json:"subject"`
			}
			if json.Unmarshal(raw, &manifest) == nil && manifest.Subject.Digest != "" {
				w.Header().Set("OCI-Subject", manifest.Subject.Digest)
			}
			r.Body = io.NopCloser(bytes.NewReader(raw))
		}
		next.ServeHTTP(w, r)
	})
}
