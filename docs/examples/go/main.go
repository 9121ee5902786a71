// Asks a Convoy server two things: what it makes of a tensor, and what it sees in a JPEG.
//
//	classify ADDRESS IMAGE [AUTHORITY.pem]
//
// With a certificate authority it speaks TLS, and then sends the token in CONVOY_TOKEN, if there is one.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pb "example.com/convoy/inference"
)

const (
	model   = "resnet50"
	timeout = 10 * time.Second
	// Bytes of an answer, where gRPC's own limit is 4 MB, and of a request that is kept to be sent again, where it is
	// 256 KB: less than the tensor of one photo.
	most = 64 << 20
)

// What a server refuses since it is stopping, or never saw, is asked again, of the next server where there are several.
const retries = `{"methodConfig": [{"name": [{"service": "inference.GRPCInferenceService"}], "retryPolicy": {
	"maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
	"retryableStatusCodes": ["UNAVAILABLE"]}}]}`

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: classify ADDRESS IMAGE [AUTHORITY.pem]")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		if said, ok := status.FromError(err); ok {
			fmt.Fprintf(os.Stderr, "%s: %s\n", said.Code(), said.Message())
		} else {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
}

func run(address, image string, authority []string) error {
	connection, err := connect(address, authority)
	if err != nil {
		return err
	}
	defer connection.Close()
	client := pb.NewGRPCInferenceServiceClient(connection)

	if err := waitUntilReady(client); err != nil {
		return err
	}
	pixels := make([]float32, 3*224*224) // a grey image, as the network takes it
	for i := range pixels {
		pixels[i] = 0.5
	}
	logits, err := infer(client, pixels, 1, 3, 224, 224)
	if err != nil {
		return err
	}
	fmt.Printf("grey: %d logits, the first is %.3f\n", len(logits), logits[0])

	file, err := os.ReadFile(image)
	if err != nil {
		return err
	}
	best, err := classify(client, file, 3)
	if err != nil {
		return err
	}
	for _, class := range best {
		fmt.Printf("%s: %s\n", filepath.Base(image), class)
	}
	return nil
}

// connect opens one connection, which any number of goroutines may share.
func connect(address string, authority []string) (*grpc.ClientConn, error) {
	options := []grpc.DialOption{
		grpc.WithDefaultServiceConfig(retries),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(most), grpc.MaxRetryRPCBufferSize(most)),
		// Finds out within 40 s that the server's machine is gone.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	}
	if len(authority) == 0 {
		return grpc.Dial(address, append(options, grpc.WithInsecure())...)
	}
	tls, err := credentials.NewClientTLSFromFile(authority[0], "")
	if err != nil {
		return nil, err
	}
	options = append(options, grpc.WithTransportCredentials(tls))
	if secret := os.Getenv("CONVOY_TOKEN"); secret != "" {
		options = append(options, grpc.WithPerRPCCredentials(token(secret)))
	}
	return grpc.Dial(address, options...)
}

// token is sent with every call, and over TLS alone.
type token string

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(t)}, nil
}

func (token) RequireTransportSecurity() bool { return true }

func waitUntilReady(client pb.GRPCInferenceServiceClient) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		// Waits for a server, too.
		answer, err := client.ModelReady(ctx, &pb.ModelReadyRequest{Name: model}, grpc.WaitForReady(true))
		if err != nil {
			return err
		}
		if answer.Ready {
			return nil
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready", model)
		}
	}
}

// infer sends the tensor that the model takes: little-endian, row by row.
func infer(client pb.GRPCInferenceServiceClient, values []float32, shape ...int64) ([]float32, error) {
	raw := make([]byte, 4*len(values))
	for i, value := range values {
		binary.LittleEndian.PutUint32(raw[4*i:], math.Float32bits(value))
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout) // the server drops what is later
	defer cancel()
	answer, err := client.ModelInfer(ctx, &pb.ModelInferRequest{
		ModelName:        model,
		Inputs:           []*pb.ModelInferRequest_InferInputTensor{{Name: "input", Datatype: "FP32", Shape: shape}},
		Outputs:          []*pb.ModelInferRequest_InferRequestedOutputTensor{{Name: "logits"}},
		RawInputContents: [][]byte{raw},
	})
	if err != nil {
		return nil, err
	}
	raw = answer.RawOutputContents[0]
	found := make([]float32, len(raw)/4)
	for i := range found {
		found[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return found, nil
}

// classify sends the file as it is; the server decodes it, and answers with "score:index:label", best first.
func classify(client pb.GRPCInferenceServiceClient, image []byte, count int64) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	answer, err := client.ModelInfer(ctx, &pb.ModelInferRequest{
		ModelName: model,
		Inputs: []*pb.ModelInferRequest_InferInputTensor{{
			Name: "input", Datatype: "BYTES", Shape: []int64{1, 1},
			Contents: &pb.InferTensorContents{BytesContents: [][]byte{image}},
		}},
		Outputs: []*pb.ModelInferRequest_InferRequestedOutputTensor{{
			Name: "logits",
			Parameters: map[string]*pb.InferParameter{
				"classification": {ParameterChoice: &pb.InferParameter_Int64Param{Int64Param: count}},
			},
		}},
	})
	if err != nil {
		return nil, err
	}
	var found []string
	for raw := answer.RawOutputContents[0]; len(raw) > 0; { // of each element its length, and its bytes
		size := 4 + binary.LittleEndian.Uint32(raw)
		text := strings.SplitN(string(raw[4:size]), ":", 3)
		found = append(found, fmt.Sprintf("%s (%s) %s", text[2], text[1], text[0]))
		raw = raw[size:]
	}
	return found, nil
}
